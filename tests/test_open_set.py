"""Seen and unseen taxa: an artificial tree with species held out, brute force, and a real network's head."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import scipy.special
import sklearn.metrics as oracle
from numpy.typing import NDArray

from bioscan.analysis.metrics import macro, recall
from bioscan.app.open_set import csv_tables, text
from bioscan.data.embeddings import schema, write_embeddings
from bioscan.data.predictions import PredictionsWriter, read_scores
from bioscan.errors import DataError, RequestError
from bioscan.files import sha256
from bioscan.jobs.linear_head import read_linear_head
from bioscan.jobs.open_set import COUNTS, SCORES, OpenSet, evaluate_open_set
from bioscan.vocabulary import RANKS

EXPERIMENT = "own_split"
WIDTH = 12
RANK_COLUMNS = ["phylum", "class", "order", "family", "genus", "species"]
KNOWN = {"Aus": ["Aus albus", "Aus niger"], "Bus": ["Bus albus", "Bus niger"], "Cus": ["Cus albus"]}
NEW = {"Aus": ["Aus novus"], "Bus": ["Bus novus"], "Dus": ["Dus novus"]}
FAMILIES = {"Aus": "Aidae", "Bus": "Aidae", "Cus": "Cidae", "Dus": "Cidae"}


@dataclass(frozen=True)
class World:
    """Files of an artificial experiment, and what they were made from."""

    predictions: Path
    catalogue: Path
    embeddings: Path
    model: Path
    frame: pl.DataFrame
    features_NF: NDArray[np.float32]
    probabilities_NL: NDArray[np.float32]
    logits_NL: NDArray[np.float64]

    def evaluate(self, **options: Any) -> OpenSet:
        return evaluate_open_set(self.predictions, self.catalogue, **options)


KNOWN_SPECIES = [species for group in KNOWN.values() for species in group]
NEW_SPECIES = [species for group in NEW.values() for species in group]


def lineage(species: str) -> tuple[str | None, ...]:
    genus = species.split()[0]
    return ("Arthropoda", "Insecta", "Ordo", FAMILIES[genus], None, None, genus, species)


def specimens() -> pl.DataFrame:
    """Known species have every role, new ones test or none; then one without a species, and two odd roles."""
    rows: list[tuple[str | None, ...]] = []
    for species in KNOWN_SPECIES:
        counts = {"train": 30, "validation": 5, "test": 20, "no_split": 2}
        rows += [(*lineage(species), role) for role, count in counts.items() for _ in range(count)]
    for species in NEW_SPECIES:
        rows += [
            (*lineage(species), role)
            for role, count in {"test": 12, "no_split": 8}.items()
            for _ in range(count)
        ]
    rows.append((*lineage("Aus albus")[:-1], None, "test"))
    rows.append((*lineage("Aus novus"), None))
    rows.append((*lineage("Aus novus"), "validation"))
    columns = [*RANKS[:8], EXPERIMENT]
    keys = pl.Series("sampleid", [f"S{i:04d}" for i in range(len(rows))])
    frame = pl.DataFrame(rows, schema=dict.fromkeys(columns, pl.String), orient="row")
    return frame.insert_column(0, keys).with_columns(image_file=pl.col("sampleid") + ".jpg")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Features cluster by genus and, within, by species; the model is a linear head of the species' means."""
    folder = tmp_path_factory.mktemp("open_set")
    frame = specimens()
    generator = np.random.default_rng(5)
    genera = {genus: generator.normal(0, 4, WIDTH) for genus in FAMILIES}
    species_at = {
        s: genera[s.split()[0]] + generator.normal(0, 1.6, WIDTH) for s in [*KNOWN_SPECIES, *NEW_SPECIES]
    }
    names = [s if s else "Aus albus" for s in frame["species"].to_list()]
    centres = np.stack([species_at[s] for s in names])
    features = (centres + generator.normal(0, 1.0, centres.shape)).astype(np.float32)
    leaves = KNOWN_SPECIES
    weight = np.stack([species_at[s] for s in leaves]).astype(np.float32)
    bias = (-0.5 * np.square(weight).sum(axis=1)).astype(np.float32)
    state = {"fc.weight": weight, "fc.bias": bias, "layer.weight": np.ones((3, 3), np.float32)}
    model = write_model(folder / "model", state, len(leaves))
    logits = features @ weight.T.astype(float) + bias
    probabilities = scipy.special.softmax(logits, axis=1).astype(np.float32)
    probabilities[3] = np.nan
    path = folder / "predictions.parquet"
    frame.write_csv(folder / "catalogue.tsv", separator="\t")
    predict(path, frame, probabilities, logits, [lineage(s) for s in leaves])
    part = folder / "part.parquet"
    table = frame.select(
        "sampleid", "image_file", embedding=pl.Series(features, dtype=pl.Array(pl.Float32, WIDTH))
    )
    table.sample(fraction=1.0, shuffle=True, seed=1).select(schema(WIDTH, "float32").names()).write_parquet(
        part
    )
    record = {"backbone": "test", "weights_sha256": read_linear_head(model).backbone_sha256}
    write_embeddings([part], folder / "embeddings.parquet", width=WIDTH, precision="float32", record=record)
    return World(
        path,
        folder / "catalogue.tsv",
        folder / "embeddings.parquet",
        model,
        frame,
        features,
        probabilities,
        logits,
    )


def write_model(folder: Path, state: dict[str, NDArray[Any]], leaves: int, **told: Any) -> Path:
    from safetensors.numpy import save_file

    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    info = {"num_leaves": leaves, "weights_sha256": sha256(folder / "model.safetensors"), **told}
    (folder / "model.json").write_text(json.dumps(info))
    return folder


def predict(
    path: Path,
    frame: pl.DataFrame,
    probabilities_NL: NDArray[np.float32],
    logits_NL: NDArray[np.float64] | None,
    leaves: list[tuple[str | None, ...]],
    **record: Any,
) -> None:
    """As `bioscan predict` writes them, every name from the most probable leaf."""
    failed = np.isnan(probabilities_NL[:, 0])
    best = np.nan_to_num(probabilities_NL).argmax(axis=1)
    columns: dict[str, Any] = {key: frame[key] for key in ("sampleid", "image_file")}
    for rank in RANK_COLUMNS:
        name_L = np.array([leaf[RANKS.index(rank)] for leaf in leaves])
        share = (probabilities_NL * (name_L == name_L[best][:, None])).sum(axis=1).astype(float)
        columns[rank] = pl.Series(name_L[best].tolist()).set(pl.Series(failed), None)
        columns[f"{rank}_probability"] = pl.Series(np.minimum(share, 1)).set(pl.Series(failed), None)
    assigned = {"rank": "species", "taxon": columns["species"], "probability": columns["species_probability"]}
    columns |= {f"assigned_{name}": value for name, value in assigned.items()}
    columns["error"] = pl.Series(["truncated JPEG" if f else None for f in failed], dtype=pl.String)
    told = {"rank": "species", "ranks": ["family", "genus", "species"], "experiment": EXPERIMENT, **record}
    energy = None if logits_NL is None else -scipy.special.logsumexp(logits_NL, axis=1)
    with PredictionsWriter(path, ranks=RANK_COLUMNS, leaves=leaves, record=told) as writer:
        writer.write(pl.DataFrame(columns), probabilities_NL, energy)


def rows(found: pl.DataFrame, name: str) -> dict[str, dict[str, Any]]:
    return {row[name]: row for row in found.to_dicts()}


# -- who is seen


def test_unseen_are_species_that_the_model_does_not_know_outside_train_and_validation(world: World) -> None:
    found = world.evaluate()
    assert (found.rank, found.above, found.role) == ("species", "genus", "test")
    assert (found.seen, found.seen_taxa) == (5 * 20, 5)
    assert (found.unseen, found.unseen_taxa) == (3 * 20 + 1, 3)  # the one whose role is null too
    assert found.counts == {
        "failed": 0,  # the one that failed is of role train
        "unlabelled": 1,
        "learned_from": 5 * 35 + 1,  # of the new species too: it chose the epoch
        "other": 5 * 2,
        "not_predicted": 0,
    }
    assert set(found.counts) <= set(COUNTS)


def test_without_a_scores_file_the_training_specimens_tell_what_is_known(world: World) -> None:
    table = pl.read_parquet(world.predictions)
    found = evaluate_open_set(table, world.catalogue, experiment=EXPERIMENT)
    assert (found.seen, found.unseen) == (100, 61)
    assert found.scores["score"].to_list() == ["msp"]
    assert set(found.not_computable) == set(SCORES) - {"msp"}
    whole = rows(world.evaluate().scores, "score")["msp"]
    assert rows(found.scores, "score")["msp"]["auroc"] == pytest.approx(whole["auroc"], abs=1e-6)


def test_without_scores_and_split_nobody_knows_what_is_unseen(world: World) -> None:
    table = pl.read_parquet(world.predictions)
    with pytest.raises(RequestError, match="neither"):
        evaluate_open_set(table, world.catalogue, experiment="none")


def test_a_catalogue_without_roles_counts_everything(world: World) -> None:
    found = world.evaluate(experiment="none")
    assert (found.seen, found.unseen) == (5 * 57, 62)
    assert found.counts["failed"] == 1
    with pytest.raises(RequestError, match="--experiment"):
        world.evaluate(experiment="none", embeddings=world.embeddings)


def test_where_nothing_is_unseen_it_says_so_and_what_to_do(world: World) -> None:
    known = world.frame.filter(pl.col("species").is_in(KNOWN_SPECIES))
    with pytest.raises(RequestError, match=r"nothing is unseen .*--all-rows"):
        evaluate_open_set(world.predictions, known)
    with pytest.raises(RequestError, match="nothing is unseen"):
        world.evaluate(rank="family")


def test_where_nothing_is_seen_it_says_so(world: World) -> None:
    new = world.frame.filter(pl.col("species").is_in(NEW_SPECIES))
    with pytest.raises(RequestError, match="no predicted specimen of role test"):
        evaluate_open_set(world.predictions, new)


def test_a_new_genus_is_unseen_at_the_rank_genus(world: World) -> None:
    found = world.evaluate(rank="genus")
    assert found.taxa["taxon"].to_list() == ["Dus"]
    assert found.above == "family"
    assert found.ranks["rank"].unique(maintain_order=True).to_list() == ["family", "genus"]


def test_names_that_stand_for_two_taxa_are_told_apart(world: World) -> None:
    """A genus of the other family with a species of a name that the model knows: it is another taxon."""
    frame = world.frame.with_columns(
        species=pl.when(pl.col("species") == "Dus novus").then(pl.lit("Aus albus")).otherwise("species")
    )
    found = evaluate_open_set(world.predictions, frame)
    assert found.homonyms == ["Aus albus"]
    assert found.unseen == 61
    assert any("Dus" in taxon for taxon in found.taxa["taxon"])


# -- scores


def expected_scores(world: World) -> dict[str, NDArray[np.float64]]:
    species = world.probabilities_NL.astype(float)
    genus = np.stack([species[:, :2].sum(axis=1), species[:, 2:4].sum(axis=1), species[:, 4]], axis=1)
    with np.errstate(invalid="ignore"):
        ratios = [species[:, :2].max(axis=1) / genus[:, 0], species[:, 2:4].max(axis=1) / genus[:, 1]]
    best = genus.argmax(axis=1)
    return {
        "msp": 1 - species.max(axis=1),
        "msp_within": 1 - np.select([best == 0, best == 1], ratios, np.nan),  # Cus has one species
        "max_logit": -world.logits_NL.max(axis=1),
        "energy": -scipy.special.logsumexp(world.logits_NL, axis=1),
    }


def test_scores_from_the_scores_file_are_those_of_the_logits(world: World) -> None:
    found = world.evaluate()
    at = world.frame.with_row_index("row").join(found.specimens, on="sampleid", maintain_order="right")["row"]
    for name, expected in expected_scores(world).items():
        values = found.specimens[name].fill_null(np.nan).to_numpy()
        np.testing.assert_allclose(values, expected[at], atol=2e-5, err_msg=name)


def test_the_temperature_of_the_record_is_taken_out_of_the_largest_logit(
    world: World, tmp_path: Path
) -> None:
    made = scipy.special.softmax(world.logits_NL / 2.5, axis=1).astype(np.float32)
    path = tmp_path / "p.parquet"
    leaves = [lineage(s) for s in KNOWN_SPECIES]
    predict(path, world.frame, made, None, leaves, temperature=2.5)
    scores = read_scores(path)
    assert scores is not None
    content = pl.read_parquet(scores.path).with_columns(
        energy=pl.Series(-2.5 * scipy.special.logsumexp(world.logits_NL / 2.5, axis=1))
    )
    content.write_parquet(scores.path, metadata=dict(pl.read_parquet_metadata(scores.path)))
    found = evaluate_open_set(path, world.catalogue)
    at = world.frame.with_row_index("row").join(found.specimens, on="sampleid", maintain_order="right")["row"]
    np.testing.assert_allclose(found.specimens["max_logit"], -world.logits_NL.max(axis=1)[at], atol=1e-4)


def test_scores_without_energy_say_so(world: World, tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    leaves = [lineage(s) for s in KNOWN_SPECIES]
    predict(path, world.frame, world.probabilities_NL, None, leaves)
    found = evaluate_open_set(path, world.catalogue)
    assert found.scores["score"].to_list() == ["msp", "msp_within"]
    assert "no energy" in found.not_computable["energy"]
    log_probabilities = tmp_path / "q.parquet"
    predict(
        log_probabilities,
        world.frame,
        world.probabilities_NL,
        np.log(np.full((world.frame.height, 5), 0.2)),
        leaves,
    )
    again = evaluate_open_set(log_probabilities, world.catalogue)
    assert "log-probabilities" in again.not_computable["max_logit"]


def test_the_table_is_scikit_learns_and_intervals_stand_around_the_values(world: World) -> None:
    found = world.evaluate(embeddings=world.embeddings, model=world.model)
    assert found.scores["score"].to_list() == list(SCORES)
    assert found.not_computable == {}
    for row in found.scores.to_dicts():
        has = found.specimens.drop_nulls(row["score"])
        score, is_unseen = has[row["score"]].to_numpy(), has["unseen"].to_numpy()
        assert row["auroc"] == pytest.approx(oracle.roc_auc_score(is_unseen, score))
        assert row["aupr_unseen"] == pytest.approx(oracle.average_precision_score(is_unseen, score))
        assert row["auroc_low"] <= row["auroc"] <= row["auroc_high"]
        flagged = score > row["threshold"]
        assert flagged[~is_unseen].mean() <= 0.05
        assert row["missed95"] == pytest.approx((~flagged[is_unseen]).mean())
        assert (row["seen"], row["unseen"]) == (100, 61) or row["score"] == "msp_within"


def test_species_held_out_of_the_tree_are_found_and_their_genus_is_named(world: World) -> None:
    found = world.evaluate(embeddings=world.embeddings, model=world.model)
    area = {row["score"]: row["auroc"] for row in found.scores.to_dicts()}
    assert max(area["knn"], area["msp"]) >= 0.8
    assert area["mahalanobis"] >= 0.8
    genus = rows(found.named_above, "of")
    assert genus["all"]["specimens"] == 61
    assert genus["known"]["specimens"] == 41  # of Aus and Bus
    assert genus["known"]["share"] >= 0.8
    assert genus["all"]["right"] == genus["known"]["right"]  # never in a genus that it does not know
    by_rank = {row["rank"]: row for row in found.ranks.filter(answers="model").to_dicts()}
    assert by_rank["genus"]["unseen_micro"] == pytest.approx(genus["all"]["share"])
    assert by_rank["species"]["unseen_micro"] == 0
    assert by_rank["species"]["hm_micro"] == 0


def test_flagged_in_the_right_genus_is_counted_by_hand(world: World) -> None:
    found = world.evaluate(embeddings=world.embeddings)
    joined = found.specimens.join(world.frame.select("sampleid", "genus"), on="sampleid")
    row = rows(found.scores, "score")["knn"]
    seen = np.sort(joined.filter(~pl.col("unseen"))["knn"].to_numpy())
    assert row["threshold"] == seen[94]  # five of a hundred lie above
    flagged = joined.filter("unseen", pl.col("knn") > seen[94])
    right = flagged.filter(pl.col("named").str.split(" ").list.first() == pl.col("genus"))
    assert row["flagged_above"] == pytest.approx(right.height / 61)
    assert 0 < row["flagged_above"] < 1 - row["missed95"]  # those of the unknown genus are flagged only


# -- names


def brute_force(
    world: World, gallery: pl.Series, queries: pl.Series, rank: str
) -> tuple[NDArray[np.bool_], list[str]]:
    """1-NN by cosine, one pair at a time."""
    features = {
        k: f.astype(float) / np.linalg.norm(f)
        for k, f in zip(world.frame["sampleid"], world.features_NF, strict=True)
    }
    names = dict(zip(world.frame["sampleid"], world.frame[rank], strict=True))
    right = []
    for query in queries:
        best = max((k for k in gallery if k != query), key=lambda k: float(features[query] @ features[k]))
        right.append(names[best] == names[query])
    return np.array(right), [names[query] for query in queries]


def per_taxon_mean(right: NDArray[np.bool_], taxa: list[str]) -> float:
    return float(np.mean([right[np.array(taxa) == taxon].mean() for taxon in set(taxa)]))


@pytest.mark.parametrize("rank", ["family", "genus", "species"])
@pytest.mark.parametrize("keys", [False, True])
def test_nearest_neighbour_numbers_of_the_clibd_protocol_are_those_of_brute_force(
    world: World, rank: str, keys: bool
) -> None:
    found = world.evaluate(embeddings=world.embeddings)
    answers = "nearest_keys" if keys else "nearest"
    row = rows(found.ranks.filter(answers=answers), "rank")[rank]
    train = world.frame.filter(pl.col(EXPERIMENT) == "train")["sampleid"]
    unseen = found.specimens.filter("unseen")["sampleid"]
    gallery = pl.concat([train, unseen]) if keys else train
    value = {}
    for name, queries in (
        ("seen", found.specimens.filter(~pl.col("unseen"))["sampleid"]),
        ("unseen", unseen),
    ):
        right, taxa = brute_force(world, gallery, queries, rank)
        value[name] = right.mean(), per_taxon_mean(right, taxa)
        assert row[f"{name}_micro"] == pytest.approx(value[name][0])
        assert row[f"{name}_macro"] == pytest.approx(value[name][1])
    for place, average in enumerate(("micro", "macro")):
        a, b = value["seen"][place], value["unseen"][place]
        assert row[f"hm_{average}"] == pytest.approx(2 * a * b / (a + b) if a + b else 0)
    if keys:
        assert 0.8 < row["unseen_micro"] < 1 or rank != "species"  # each left itself out


def test_macro_is_the_projects_own_and_ends_stand_around_every_value(world: World) -> None:
    found = world.evaluate(embeddings=world.embeddings)
    for row in found.ranks.to_dicts():
        for place in ("seen", "unseen", "hm"):
            for average in ("micro", "macro"):
                low, value, high = (row[f"{place}_{average}{end}"] for end in ("_low", "", "_high"))
                assert low - 1e-12 <= value <= high + 1e-12
    seen = found.specimens.filter(~pl.col("unseen"))
    support = seen.group_by("taxon").len().sort("taxon")["len"].to_numpy()
    right = (
        seen.group_by("taxon")
        .agg((pl.col("named") == pl.col("taxon")).sum())
        .sort("taxon")["named"]
        .to_numpy()
    )
    expected = macro(recall(right, support), support, support)
    assert rows(found.ranks.filter(answers="model"), "rank")["species"]["seen_macro"] == pytest.approx(
        float(expected)
    )


def test_unseen_taxa_are_listed_with_what_they_are_taken_for(world: World) -> None:
    found = world.evaluate(embeddings=world.embeddings)
    listed = rows(found.taxa, "taxon")
    assert {taxon: row["specimens"] for taxon, row in listed.items()} == {
        "Aus novus": 21,
        "Bus novus": 20,
        "Dus novus": 20,
    }
    row = listed["Aus novus"]
    part = found.specimens.filter(pl.col("taxon") == "Aus novus")
    assert row["times"] == part["named"].value_counts()["count"].max()
    seen = found.specimens.filter(~pl.col("unseen"))
    both = pl.concat([seen, part])
    assert row["knn"] == pytest.approx(oracle.roc_auc_score(both["unseen"], both["knn"]))
    weighted = sum(r["specimens"] * r["msp"] for r in listed.values()) / found.unseen
    assert weighted == pytest.approx(rows(found.scores, "score")["msp"]["auroc"])
    assert listed["Dus novus"]["right_above"] == 0


# -- faults


def test_a_specimen_without_an_embedding_lacks_only_its_scores(world: World, tmp_path: Path) -> None:
    table = pl.read_parquet(world.embeddings)
    gone = world.evaluate().specimens.filter("unseen")["sampleid"][0]
    path = tmp_path / "fewer.parquet"
    part = tmp_path / "part.parquet"
    table.filter(pl.col("sampleid") != gone).write_parquet(part)
    write_embeddings([part], path, width=WIDTH, precision="float32", record={"backbone": "test"})
    found = world.evaluate(embeddings=path)
    assert found.counts["not_embedded"] == 1
    row = found.specimens.filter(sampleid=gone)
    assert row["knn"].item() is None
    assert row["nearest"].item() is None
    assert row["msp"].item() is not None
    by_score = rows(found.scores, "score")
    assert (by_score["knn"]["unseen"], by_score["msp"]["unseen"]) == (60, 61)


def test_a_failed_image_is_an_error_without_a_score(world: World, tmp_path: Path) -> None:
    made = world.probabilities_NL.copy()
    at = int(world.evaluate().specimens["sampleid"][0][1:])
    made[at] = np.nan
    path = tmp_path / "p.parquet"
    predict(path, world.frame, made, world.logits_NL, [lineage(s) for s in KNOWN_SPECIES])
    found = evaluate_open_set(path, world.catalogue)
    assert found.counts["failed"] == 1
    row = found.specimens.row(0, named=True)
    assert row["error"] == "truncated JPEG"
    assert all(row[name] is None for name in ("named", "msp", "msp_within", "energy", "max_logit"))
    assert rows(found.scores, "score")["msp"]["seen"] == 99
    assert rows(found.ranks, "rank")["species"]["seen"] == 100


def test_embeddings_of_other_specimens_and_a_model_without_embeddings_are_refused(
    world: World, tmp_path: Path
) -> None:
    table = pl.read_parquet(world.embeddings)
    for name, kept, said in (
        ("no_train", pl.col("sampleid") > "S0150", "training specimens"),
        ("no_test", ~pl.col("sampleid").is_in(world.evaluate().specimens["sampleid"].implode()), "evaluated"),
    ):
        part, path = tmp_path / f"{name}.part.parquet", tmp_path / f"{name}.parquet"
        if name == "no_train":
            train = world.frame.filter(pl.col(EXPERIMENT) == "train")["sampleid"]
            kept = ~pl.col("sampleid").is_in(train.implode())
        table.filter(kept).write_parquet(part)
        write_embeddings([part], path, width=WIDTH, precision="float32", record={"backbone": "test"})
        with pytest.raises(RequestError, match=said):
            world.evaluate(embeddings=path)
    with pytest.raises(RequestError, match="--embeddings"):
        world.evaluate(model=world.model)
    twice = tmp_path / "twice.parquet"
    part = tmp_path / "twice.part.parquet"
    pl.concat([table, table.head(1)]).write_parquet(part)
    write_embeddings([part], twice, width=WIDTH, precision="float32", record={"backbone": "test"})
    with pytest.raises(DataError, match="sampleid"):
        world.evaluate(embeddings=twice)


def test_numbers_that_are_not_finite_and_scores_of_other_specimens_are_told(
    world: World, tmp_path: Path
) -> None:
    values = world.features_NF.copy()
    values[7, 3] = np.inf
    table = world.frame.select(
        "sampleid", "image_file", embedding=pl.Series(values, dtype=pl.Array(pl.Float32, WIDTH))
    )
    part, path = tmp_path / "part.parquet", tmp_path / "wild.parquet"
    table.write_parquet(part)
    write_embeddings([part], path, width=WIDTH, precision="float32", record={"backbone": "test"})
    with pytest.raises(DataError, match="not finite"):
        world.evaluate(embeddings=path)
    predictions = tmp_path / "p.parquet"
    leaves = [lineage(s) for s in KNOWN_SPECIES]
    predict(predictions, world.frame, world.probabilities_NL, world.logits_NL, leaves)
    scores = read_scores(predictions)
    assert scores is not None
    footer = dict(pl.read_parquet_metadata(scores.path))
    pl.read_parquet(scores.path).head(200).write_parquet(scores.path, metadata=footer)
    with pytest.raises(DataError, match="not of these predictions"):
        evaluate_open_set(predictions, world.catalogue)


def test_a_model_that_the_embeddings_do_not_come_from_is_refused(world: World, tmp_path: Path) -> None:
    state = {
        "fc.weight": np.ones((5, WIDTH), np.float32),
        "fc.bias": np.zeros(5, np.float32),
        "layer.weight": np.zeros((3, 3), np.float32),
    }
    other = write_model(tmp_path / "other", state, 5)
    with pytest.raises(RequestError, match="other weights"):
        world.evaluate(embeddings=world.embeddings, model=other)


def test_only_a_flat_softmax_with_one_linear_head_that_is_unaltered_can_be_read(tmp_path: Path) -> None:
    state = {"fc.weight": np.ones((5, 4), np.float32), "fc.bias": np.zeros(5, np.float32)}
    for name, told, said in (
        ("cosine", {"head": {"kind": "cosine"}}, "cosine"),
        ("conditional", {"softmax": "conditional"}, "conditional"),
        ("altered", {"weights_sha256": "0"}, "SHA-256"),
    ):
        with pytest.raises((RequestError, DataError), match=said):
            read_linear_head(write_model(tmp_path / name, state, 5, **told))
    twice = state | {"head.weight": np.ones((5, 4), np.float32), "head.bias": np.zeros(5, np.float32)}
    with pytest.raises(RequestError, match="2 layers"):
        read_linear_head(write_model(tmp_path / "twice", twice, 5))
    with pytest.raises(RequestError, match="none fits"):
        read_linear_head(write_model(tmp_path / "none", state, 6))
    with pytest.raises(RequestError, match="no model folder"):
        read_linear_head(tmp_path)
    broken = write_model(tmp_path / "broken", state, 5)
    (broken / "model.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        read_linear_head(broken)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_the_head_and_the_hash_are_those_of_the_real_network(name: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from bioscan.learn.compat import import_timm
    from bioscan.learn.embeddings import backbone_sha256
    from bioscan.learn.heads import features_of

    torch.manual_seed(0)
    network = import_timm().create_model(name, num_classes=7).eval()
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(network.state_dict(), folder / "model.safetensors")
    told = {"num_leaves": 7, "weights_sha256": sha256(folder / "model.safetensors")}
    (folder / "model.json").write_text(json.dumps(told))
    head = read_linear_head(folder)
    assert head.backbone_sha256 == backbone_sha256(network)
    images = torch.rand(3, 3, *network.pretrained_cfg["input_size"][1:])
    with torch.inference_mode():
        features, expected = features_of(network, images).numpy(), network(images).numpy()
    np.testing.assert_allclose(features @ head.weight_LF.T + head.bias_L, expected, atol=1e-4)


# -- words


def test_the_text_says_what_was_found_and_what_it_means(world: World) -> None:
    shown = text(world.evaluate(embeddings=world.embeddings))
    assert "100 specimens of 5 seen taxa, 61 of 3 unseen taxa at rank species" in shown
    assert "not computable: vim (it needs the model" in shown
    for said in (
        "FPR@95: share of the seen flagged",
        "nearest_keys",
        "genus right for",
        "Aus novus",
        "1 without a name",
    ):
        assert said in shown
    assert "nan" not in shown.lower()


def test_the_tables_and_the_json_hold_it_all(world: World, tmp_path: Path) -> None:
    from bioscan.app.output import to_json

    found = world.evaluate(embeddings=world.embeddings, model=world.model)
    content = json.loads(to_json(found.to_dict()))
    assert content["unseen"] == 61
    assert [row["score"] for row in content["scores"]] == list(SCORES)
    assert content["ranks"][0]["answers"] == "model"
    for name, table in csv_tables(found).items():
        table.write_csv(tmp_path / f"{name}.csv")
        assert table.height > 0, name
    curve = found.curves.filter(score="knn")
    assert curve["unseen_flagged"].to_list() == sorted(curve["unseen_flagged"])


def test_it_imports_no_torch(world: World) -> None:
    program = f"""
import sys
from bioscan.app.open_set import text
from bioscan.jobs.open_set import evaluate_open_set
paths = {[str(p) for p in (world.predictions, world.catalogue, world.embeddings, world.model)]!r}
text(evaluate_open_set(paths[0], paths[1], embeddings=paths[2], model=paths[3]))
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
