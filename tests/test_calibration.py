"""From network outputs to a calibration, and into a model folder and back."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from numpy.typing import NDArray

from bioscan import vocabulary
from bioscan.analysis import conformal
from bioscan.analysis.hierarchy import lineages
from bioscan.analysis.reliability import UNKNOWN
from bioscan.analysis.taxonomy import Taxonomy
from bioscan.errors import DataError, RequestError
from bioscan.learn import calibrating, model_folder, models
from bioscan.learn.calibrating import Outputs, second_part
from bioscan.learn.calibration import Calibration
from bioscan.learn.dataset import ImageSpec
from bioscan.learn.losses import outputs_of
from bioscan.learn.model_folder import Model
from bioscan.learn.specimens import Labelled

SPEC = ImageSpec(image_size=36, crop_size=32, mean=(0.0,) * 3, std=(1.0,) * 3)
# Bidae has no named genus, Dus no family: the leaves are Aus, Ana, Bidae, Dus, Cus
RECORDS = pl.DataFrame(
    [
        *[("Diptera", "Aidae", "Aus")] * 4,
        *[("Diptera", "Aidae", "Ana")] * 2,
        *[("Diptera", "Aidae", None)] * 2,
        *[("Diptera", "Bidae", None)] * 2,
        ("Diptera", None, "Dus"),
        *[("Coleoptera", "Cidae", "Cus")] * 3,
    ],
    schema=dict.fromkeys(("order", "family", "genus"), pl.String),
    orient="row",
)
RANKS = ("order", "family", "genus")
TREE, _ = Taxonomy.build(RECORDS, RANKS).filled()
NODE = {TREE.name(node): node for node in range(1, TREE.num_nodes)}
LEAVES = [TREE.name(int(node)) for node in TREE.leaves_L]


def model_of(softmax: Any = "flat", taxonomy: Taxonomy = TREE) -> Model:
    """A model whose network is never asked."""
    outputs = outputs_of(taxonomy, softmax)
    torch.manual_seed(0)
    network = models.create("test_resnet", outputs=outputs, crop_size=32)
    counts_N = np.bincount(TREE.targets(RECORDS), minlength=TREE.num_nodes)
    return Model(network, taxonomy, SPEC, {}, "", softmax, counts_N)


MODEL = model_of()


def labelled(names: Sequence[tuple[str, ...]], groups: list[str] | None = None) -> Labelled:
    """Specimens by their true names at the ranks, "" for none; names that the tree lacks are strangers."""
    columns: dict[str, Any] = {"key": [f"s{n}" for n in range(len(names))]}
    columns["group"] = groups or columns["key"]
    known = [[NODE.get(name, UNKNOWN) if name else None for name in path] for path in names]
    columns["node"] = [max([n for n in path if n is not None and n > 0], default=-1) for path in known]
    for place, rank in enumerate(RANKS):
        columns[f"{rank}_true"] = pl.Series([path[place] for path in known], dtype=pl.Int32)
    table = pl.DataFrame(columns)
    return Labelled(table, "none" if groups is None else "plate", table.clear(), {}, None)


def drawn(n: int, seed: int, scale: float = 1.0) -> tuple[NDArray[np.float32], list[tuple[str, ...]]]:
    """Logits, and true paths that are drawn with the softmax of these divided by the scale."""
    generator = np.random.default_rng(seed)
    logits_XL = generator.normal(0, 2, (n, TREE.num_leaves)) * scale
    shown_XL = np.exp(logits_XL / scale)
    shown_XL /= shown_XL.sum(axis=1, keepdims=True)
    leaf_X = (shown_XL.cumsum(axis=1) < generator.random((n, 1))).sum(axis=1)
    return logits_XL.astype(np.float32), [path_of(int(leaf)) for leaf in leaf_X]


def path_of(leaf: int) -> tuple[str, ...]:
    nodes = lineages(TREE, TREE.leaves_L[leaf : leaf + 1])[:, 0]
    return tuple(TREE.name(node) if node >= 0 else "" for node in nodes.tolist())


def calibrated(
    logits_XM: NDArray[np.float32],
    of: Labelled,
    second: NDArray[np.bool_] | None = None,
    model: Model = MODEL,
    **options: Any,
) -> Calibration:
    n = len(logits_XM)
    outputs = Outputs(model, np.arange(n), {}, logits_XM)
    return calibrating.calibrate(outputs, of, np.arange(n) % 2 == 1 if second is None else second, **options)


def records(made: Calibration) -> pl.DataFrame:
    assert made.records is not None
    return made.records


# -- the temperature


@pytest.mark.parametrize("planted", [0.5, 2.0])
def test_a_planted_temperature_is_recovered_within_two_per_cent(planted: float) -> None:
    logits_XL, names = drawn(40_000, 3, planted)
    made = calibrated(logits_XL, labelled(names))
    assert made.temperature == pytest.approx(planted, rel=0.02)
    assert made.info["first"] == made.info["second"] == {"n": 20_000, "groups": 20_000}
    for row in made.info["ranks"].values():  # measured on specimens that it was not fitted to
        assert row["nll_after"] < row["nll_before"]
    # at the order only: to have a name at a lower rank says something of the taxon already
    assert made.info["ranks"]["order"]["ece_after"] < 0.01 < made.info["ranks"]["order"]["ece_before"]


def test_partly_named_specimens_give_the_temperature_too() -> None:
    logits_XL, names = drawn(20_000, 4, 1.5)
    to_order = [(path[0], "", "") for path in names]
    made = calibrated(logits_XL, labelled(to_order))
    assert made.temperature == pytest.approx(1.5, rel=0.05)
    assert made.info["ranks"]["genus"]["n"] == 0
    assert made.info["ranks"]["genus"]["nll_after"] is None


def test_the_second_part_has_no_say_in_the_temperature() -> None:
    logits_XL, names = drawn(400, 5)
    right = calibrated(logits_XL, labelled(names))
    other = [path if n % 2 == 0 else ("Odonata", "", "") for n, path in enumerate(names)]
    assert calibrated(logits_XL, labelled(other)).temperature == right.temperature
    assert calibrated(logits_XL[::-1].copy(), labelled(names)).temperature != right.temperature


def test_answers_that_are_all_right_leave_the_temperature_at_one() -> None:
    logits_XL, _ = drawn(60, 6)
    best = [path_of(int(leaf)) for leaf in logits_XL.argmax(axis=1)]
    made = calibrated(logits_XL, labelled(best))
    assert made.temperature == 1
    assert made.info["fit"]["nll_after"] == made.info["fit"]["nll_before"]
    assert "all 30 specimens for the temperature are named right" in made.info["warnings"][0]


def test_a_temperature_at_its_upper_bound_is_told() -> None:
    logits_XL, _ = drawn(60, 6)
    worst = [path_of(int(leaf)) for leaf in logits_XL.argmin(axis=1)]
    made = calibrated(logits_XL, labelled(worst))
    assert made.temperature == pytest.approx(20)
    assert "something else is wrong with the model" in made.info["warnings"][0]


def test_strangers_alone_give_no_temperature() -> None:
    with pytest.raises(DataError, match="none of the 2 specimens for the temperature has a taxon"):
        calibrated(np.zeros((4, 5), np.float32), labelled([("Odonata", "", "")] * 4))


# -- records


@pytest.mark.parametrize("softmax", ["flat", "conditional"])
@pytest.mark.parametrize(("tau", "rule"), [(0.0, "leaf"), (1.0, "greedy"), (0.5, "distance")])
def test_records_are_those_of_a_loop_over_specimens_and_taxa(softmax: str, tau: float, rule: str) -> None:
    model = model_of(softmax)
    generator = np.random.default_rng(8)
    outputs_XM = generator.normal(0, 2, (60, outputs_of(TREE, softmax))).astype(np.float32)  # type: ignore[arg-type]
    leaf_X = generator.integers(0, TREE.num_leaves, 60)
    names = [path_of(int(leaf)) for leaf in leaf_X]
    names[1], names[3] = ("Diptera", "Eidae", "Eus"), ("Odonata", "", "")
    made = calibrated(outputs_XM, labelled(names), model=model, tau=tau, rule=rule)
    found = records(made)
    assert found["group"].to_list() == [f"s{n}" for n in range(1, 60, 2)]
    raw_XL = model.leaf_logits(torch.from_numpy(outputs_XM).double()).numpy()
    for row, x in enumerate(range(1, 60, 2)):
        # the order of things: logit adjustment, temperature, sums up the tree
        logits_L = (raw_XL[x] - tau * model.log_prior_L) / made.temperature
        p_L = np.exp(logits_L - logits_L.max())
        p_L /= p_L.sum()
        for place, rank in enumerate(RANKS):
            sums = {
                n: p_L[TREE.first_leaf_N[n] : TREE.end_leaf_N[n]].sum()
                for n in range(1, TREE.num_nodes)
                if vocabulary.RANKS[TREE.rank_N[n]] == rank
            }
            one = {k.removeprefix(f"{rank}_"): v for k, v in found.row(row, named=True).items() if rank in k}
            name = names[x][place]
            assert one["true"] == (NODE.get(name, UNKNOWN) if name else None)
            if one["named"] is None:
                assert one["probability"] is None
            else:
                assert one["probability"] == pytest.approx(sums[one["named"]], abs=1e-6)
            if not name:
                assert one["truth_probability"] is one["before"] is one["place"] is None
            elif name not in NODE:
                assert (one["truth_probability"], one["before"], one["place"]) == (0, 1, len(sums))
            else:
                mine = sums[NODE[name]]
                rest = 1 - sum(sums.values())  # leaves that end above the rank stand together as one class
                ahead = [value for value in (*sums.values(), rest) if value > mine]
                assert one["truth_probability"] == pytest.approx(mine, abs=1e-6)
                assert one["before"] == pytest.approx(sum(ahead), abs=1e-6)
                assert one["place"] == len(ahead)
        # the path that is named is one of a leaf
        path = [found[f"{rank}_named"][row] for rank in RANKS]
        paths = lineages(TREE, TREE.leaves_L).T.tolist()
        assert [-1 if n is None else n for n in path] in paths


def test_records_give_the_coverage_that_was_asked_for_on_others() -> None:
    logits_XL, names = drawn(6_000, 9, 2.0)
    made = calibrated(logits_XL, labelled(names), np.arange(6_000) >= 4_000)
    frame = records(made)
    nodes = np.unique(frame["order_true"].to_numpy())
    truth = conformal.Truth(
        frame["order_truth_probability"].to_numpy(),
        frame["order_before"].to_numpy(),
        frame["order_place"].to_numpy(),
        np.searchsorted(nodes, frame["order_true"].to_numpy()),
    )
    threshold = conformal.calibrate("lac", truth, error=0.1).threshold
    fresh_XL, fresh_names = drawn(4_000, 10, 2.0)
    fresh = records(
        calibrated(
            np.vstack([logits_XL[:4_000], fresh_XL]),
            labelled(names[:4_000] + fresh_names),
            np.arange(8_000) >= 4_000,
        )
    )
    covered = (1 - fresh["order_truth_probability"] <= threshold).mean()
    assert covered == pytest.approx(0.9, abs=4 * math.sqrt(0.09 / 2_000 + 0.09 / 4_000))


def test_temperatures_by_rank_make_no_rank_surer_than_those_above_it() -> None:
    logits_XL, names = drawn(2_000, 11, 2.0)
    made = calibrated(logits_XL, labelled(names), per_rank=True)
    assert made.rank_temperatures is not None
    assert [*made.rank_temperatures] == [*RANKS]
    frame = records(made).select(f"{rank}_probability" for rank in RANKS)
    plain = records(calibrated(logits_XL, labelled(names))).select(frame.columns)
    assert not frame.equals(plain)
    above_X = np.full(frame.height, np.inf)
    for column in frame:
        values_X = column.fill_null(0).to_numpy()
        assert (values_X <= above_X).all()
        above_X = np.where(column.is_null().to_numpy(), above_X, values_X)


def test_a_rank_without_a_temperature_of_its_own_has_the_sums_that_predict_has() -> None:
    logits_XL, names = drawn(500, 12, 2.0)
    outputs, truths = Outputs(MODEL, np.arange(500), {}, logits_XL), labelled(names).table
    options: dict[str, Any] = {"tau": 0.0, "rule": "leaf", "temperature": 1.3}
    plain = calibrating.records_of(outputs, np.arange(500), truths, **options)
    mixed = calibrating.records_of(outputs, np.arange(500), truths, **options, ranks={"family": 1.5})
    columns = ("order_probability", "order_truth_probability", "order_before", "order_place")
    assert mixed.select(columns).equals(plain.select(columns))
    assert not mixed["family_probability"].equals(plain["family_probability"])


def test_names_of_strangers_are_wrong_and_those_that_nobody_can_check_are_not_counted() -> None:
    logits_XL = np.zeros((60, TREE.num_leaves), np.float32)
    logits_XL[:, LEAVES.index("Aus")] = 1  # everything is called Aus
    names = [("Diptera", "Aidae", "Aus")] * 56 + [("Diptera", "Aidae", "Xus"), ("Diptera", "", "")] * 2
    made = calibrated(logits_XL, labelled(names), np.arange(60) >= 30)
    assert made.reliability is not None
    genus = made.reliability.row(by_predicate=pl.col("name") == "Aus", named=True)
    assert (genus["checked"], genus["right"], genus["confusions"]) == (
        28,
        26,
        "taxa the model does not know 7 %",
    )
    assert (genus["training"], genus["support"]) == (4, 26)
    order = made.reliability.row(by_predicate=pl.col("name") == "Diptera", named=True)
    assert (order["checked"], order["right"], order["training"]) == (30, 30, 11)


# -- parts


def test_whole_groups_are_kept_and_none_where_they_are_too_few() -> None:
    groups = [f"plate{n // 5}" for n in range(200)]
    of = labelled([("Diptera", "", "")] * 200, groups)
    second_X = second_part(of, 0.5)
    assert 0.2 < second_X.mean() < 0.8
    assert (second_X.reshape(40, 5) == second_X[::5, None]).all()
    few = labelled([("Diptera", "", "")] * 200, [f"plate{n // 20}" for n in range(200)])
    assert not second_part(few, 0.5).any()
    assert not second_part(of, 0).any()


def test_without_a_second_part_there_is_a_temperature_and_the_reason() -> None:
    logits_XL, names = drawn(50, 12)
    none = np.zeros(50, bool)
    of = labelled(names, ["one"] * 50)
    made = calibrated(logits_XL, of, none, info={"share": 0.5, "warnings": ["first"]})
    assert (made.records, made.reliability, made.info["measured_on"]) == (None, None, "first")
    assert made.info["warnings"][0] == "first"
    assert made.info["warnings"][1].endswith("of 1 plates no two parts of 10 or more were made")
    asked = calibrated(logits_XL, of, none, info={"share": 0.0})
    assert "as asked" in asked.info["warnings"][0]
    assert asked.cut is None


def test_the_cut_of_validation_specimens_is_told_to_evaluation() -> None:
    logits_XL, names = drawn(60, 13)
    told = {"share": 0.5, "seed": 0, "roles": ["validation"]}
    assert calibrated(logits_XL, labelled(names), info=told).cut == {"group": "none", "share": 0.5, "seed": 0}
    assert calibrated(logits_XL, labelled(names), info={**told, "roles": []}).cut is None


# -- model folders


def saved(folder: Path, calibration: Calibration | None) -> Path:
    model_folder.save(
        folder,
        MODEL.network.state_dict(),
        backbone="test_resnet",
        taxonomy=TREE,
        spec=SPEC,
        record={"experiment": "large_insect_order"},
        history=[],
        calibration=calibration,
    )
    return folder


def some() -> Calibration:
    logits_XL, names = drawn(80, 14)
    return calibrated(logits_XL, labelled(names), info={"share": 0.5, "seed": 0, "roles": ["validation"]})


def same(one: Calibration | None, other: Calibration) -> bool:
    return (
        one is not None
        and one.records is not None
        and one.reliability is not None
        and one.records.equals(records(other))
        and one.reliability.equals(other.reliability if other.reliability is not None else pl.DataFrame())
        and replace(one, records=None, reliability=None, fingerprint="")
        == replace(other, records=None, reliability=None)
    )


def test_a_calibration_comes_back_from_the_model_folder(tmp_path: Path) -> None:
    made = some()
    bare = model_folder.load(saved(tmp_path / "bare", None))
    loaded = model_folder.load(saved(tmp_path / "m", made))
    assert bare.calibration is None
    assert same(loaded.calibration, made)
    assert loaded.info["weights_sha256"] == bare.info["weights_sha256"]
    assert loaded.fingerprint != bare.fingerprint
    warm = model_folder.load(saved(tmp_path / "warm", replace(made, temperature=1.25)))
    assert loaded.calibration is not None
    assert warm.calibration is not None
    assert warm.calibration.fingerprint != loaded.calibration.fingerprint != ""


def test_another_calibration_leaves_all_else_as_it_is(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", None)
    (folder / "model.onnx").write_bytes(b"onnx")
    made = some()
    model_folder.recalibrated(folder, tmp_path / "new", made)
    assert same(model_folder.load(tmp_path / "new").calibration, made)
    assert model_folder.load(folder).calibration is None
    for name in ("model.onnx", "model.safetensors", "history.csv"):
        assert (folder / name).read_bytes() == (tmp_path / "new" / name).read_bytes()
    # in place, and then one without tables, which leaves none behind
    model_folder.recalibrated(folder, folder, made, overwrite=True)
    assert (folder / "calibration.parquet").is_file()
    model_folder.recalibrated(folder, folder, replace(made, records=None, reliability=None), overwrite=True)
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        ["model.json", "model.safetensors", "model.onnx", "history.csv", "README.md"]
    )
    with pytest.raises(RequestError, match="exists"):
        model_folder.recalibrated(folder, tmp_path / "new", made)


@pytest.mark.parametrize("name", ["calibration.parquet", "reliability.parquet"])
def test_a_table_that_was_altered_or_lost_is_told(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path / "m", some())
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: not the table that model.json names"):
        model_folder.load(folder)
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"{name}: is missing"):
        model_folder.load(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told.pop("temperature"),
        lambda told: told.update(temperature="warm"),
        lambda told: told.update(files=["calibration.parquet"]),
        lambda told: told.update(rank_temperatures=3),
    ],
)
def test_a_calibration_that_cannot_be_understood_is_told(
    tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    folder = saved(tmp_path / "m", some())
    info = json.loads((folder / "model.json").read_text())
    change(info["calibration"])
    info["content_sha256"] = model_folder.content_sha256(info)
    (folder / "model.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match="cannot be read"):
        model_folder.load(folder)


def test_a_model_json_altered_in_its_calibration_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", some())
    info = json.loads((folder / "model.json").read_text())
    info["calibration"]["temperature"] = 3.0
    (folder / "model.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match="was altered"):
        model_folder.load(folder)


def test_the_card_says_how_far_the_confidence_goes(tmp_path: Path) -> None:
    made = some()
    card = (saved(tmp_path / "m", made) / "README.md").read_text()
    assert (
        f"Temperature {made.temperature:.4g} for tau 0 and decoding leaf, from 40 labelled specimens; "
        in card
    )
    assert "40 others were kept for thresholds and prediction sets" in card
    assert f"| order | 40 | {made.info['ranks']['order']['nll_after']:.4f} |" in card
    assert "- taxa with fewer than 10 specimens" in card
    assert "Not calibrated" in (saved(tmp_path / "n", None) / "README.md").read_text()
