"""The artificial dataset: its layout, its truth, its faults, and that equal settings give equal bytes."""

import hashlib
import io
import itertools
import json
import re
import subprocess
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, UnidentifiedImageError

from bioscan.data.images import Images
from bioscan.data.metadata import read_metadata
from bioscan.data.synthesis import METADATA, SynthesisSettings, synthesize
from bioscan.data.synthesis_faults import FAULTS
from bioscan.data.synthesis_pictures import PLANS, TRAITS, Studio, Subject, plate_light
from bioscan.data.synthesis_tree import DIPTERA_FAMILIES, ORDERS, grow
from bioscan.errors import RequestError
from bioscan.vocabulary import BIN_URI, COLUMNS, EXPERIMENTS, SAMPLE_ID

SMALL = SynthesisSettings(specimens=260, seed=5, zip=True, hdf5=True, part_size=100)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset without faults."""
    out = tmp_path_factory.mktemp("clean") / "data"
    synthesize(out, SMALL)
    return out


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with faults."""
    out = tmp_path_factory.mktemp("faulty") / "data"
    synthesize(out, replace(SMALL, faults=True))
    return out


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Metadata of 30,000 specimens."""
    out = tmp_path_factory.mktemp("many") / "data"
    synthesize(out, SynthesisSettings(specimens=30_000, seed=2, images=False))
    return out


def table(path: Path) -> pl.DataFrame:
    return pl.read_csv(path, separator="\t", quote_char=None, infer_schema=False)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# Layout


def test_the_metadata_has_the_28_columns_and_reads_as_a_table_of_unique_specimens(clean: Path) -> None:
    raw = table(clean / METADATA)
    assert tuple(raw.columns) == COLUMNS
    assert raw.height == 260
    assert set(raw.select(*EXPERIMENTS).unique().row(0)) == {"no_split"}
    assert raw["copyright_license"].unique().to_list() == ["CC0 1.0 (artificial)"]
    assert raw["subspecies"].unique().to_list() == ["not_classified"]
    frame = read_metadata(clean / METADATA)
    assert frame["chunk_number"].to_list() == [i // 100 + 1 for i in range(260)]
    for column in ("sampleid", "processid", "image_file"):
        assert frame[column].n_unique() == 260
    assert all(SAMPLE_ID.match(s) and re.match(r"BIOUG\d{5}-[A-H]\d\d$", s) for s in frame["sampleid"])
    assert all(BIN_URI.match(uri) for uri in frame["uri"])
    assert all(re.match(r"[A-Z]+\d+-\d\d$", p) for p in frame["processid"])
    assert {bool(re.match(r"\d+\.jpg$", f)) for f in frame["image_file"]} == {True, False}


def test_name_is_the_deepest_label(clean: Path) -> None:
    frame = read_metadata(clean / METADATA)
    ranks = ("species", "genus", "tribe", "subfamily", "family", "order")
    expected = [next(row[r] for r in ranks if row[r] is not None) for row in frame.iter_rows(named=True)]
    assert frame["name"].to_list() == expected


def test_a_plate_holds_95_specimens_and_an_empty_control_well(clean: Path) -> None:
    lineage = table(clean / "truth/lineage.tsv")
    assert lineage["plate"].value_counts(sort=True)["count"].to_list() == [95, 95, 70]
    assert "H12" not in lineage["well"].to_list()
    assert (lineage["plate"] + "-" + lineage["well"]).to_list() == lineage["sampleid"].to_list()
    controls = {p.name for p in (clean / "control_wells").iterdir()}
    assert controls == {f"{plate}-H12.jpg" for plate in lineage["plate"].unique()}


def test_folder_zip_and_hdf5_hold_the_same_bytes(clean: Path) -> None:
    names = read_metadata(clean / METADATA)["image_file"].to_list()
    forms = {}
    for path in ("bioscan/images/original_256", "original_256.zip", "original_256.hdf5"):
        images = Images(clean / path, save_index=False)
        assert len(images) == 260
        forms[images.form] = [images.read(int(row)) for row in images.find(names)]
    assert list(forms) == ["part folders", "zip", "hdf5"]
    assert forms["part folders"] == forms["zip"] == forms["hdf5"]
    for data in forms["zip"][:5]:
        with Image.open(io.BytesIO(data)) as picture:
            assert (picture.format, picture.size, picture.mode) == ("JPEG", (341, 256), "RGB")


def test_zip_and_hdf5_are_laid_out_as_published(clean: Path) -> None:
    frame = read_metadata(clean / METADATA)
    members = [
        f"bioscan/images/original_256/part{c}/{f}"
        for f, c in frame.select("image_file", "chunk_number").rows()
    ]
    with zipfile.ZipFile(clean / "original_256.zip") as archive:
        assert archive.namelist() == members
        assert {i.compress_type for i in archive.infolist()} == {zipfile.ZIP_STORED}
        assert archive.testzip() is None
    assert all((clean / member).is_file() for member in members)
    with h5py.File(clean / "original_256.hdf5") as file:
        group = file["bioscan_dataset"]
        assert set(group) == set(frame["image_file"])
        assert (group[frame["image_file"][0]].dtype, group[frame["image_file"][0]].ndim) == (np.uint8, 1)
        assert group.attrs["Copyright License"] == "CC0 1.0 (artificial)"


# Taxa and labels


def test_at_the_published_size_orders_and_diptera_families_have_the_published_counts() -> None:
    tree = grow(1_128_313, 1.0, np.random.default_rng(0))
    lineage = tree.lineage(tree.bin_species)
    counts = np.bincount(lineage["order"], weights=tree.bin_size)
    assert dict(zip(tree.names["order"].tolist(), counts.tolist(), strict=True)) == {
        name: count for name, (count, _) in ORDERS.items()
    }
    labelled = np.where(tree.bin_known["family"], tree.bin_size, 0)
    families = np.bincount(lineage["family"], weights=labelled)
    diptera = np.flatnonzero(tree.above["family"] == 0)
    found = dict(zip(tree.names["family"][diptera].tolist(), families[diptera].tolist(), strict=True))
    assert {name: found[name] for name in DIPTERA_FAMILIES} == DIPTERA_FAMILIES
    others = [count for name, count in found.items() if name not in DIPTERA_FAMILIES]
    assert max(others) < min(DIPTERA_FAMILIES.values())  # else the 40 most populous would be others
    assert len(tree.bin_size) == 90_918
    assert len(tree.names["family"]) > 450
    assert len(np.unique(tree.bin_uri)) == 90_918
    assert len(np.unique(tree.names["genus"])) == len(tree.names["genus"])
    assert len(np.unique(tree.names["species"])) == len(tree.names["species"])


def test_labels_are_missing_in_the_published_proportions(many: Path) -> None:
    frame = read_metadata(many / METADATA)
    share = {c: 1 - frame[c].null_count() / frame.height for c in ("uri", "order", *FAMILY_DOWN)}
    assert share["uri"] == share["order"] == 1
    # Of BIOSCAN-1M; the split into BINs makes them approximate.
    published = {"subfamily": 0.235, "tribe": 0.054, "genus": 0.225, "species": 0.075}
    assert {r: share[r] for r in published} == pytest.approx(published, abs=0.01)
    assert 0.95 < share["family"] < 0.99  # softer imbalance, so fewer Diptera: more without a family
    assert frame.filter(pl.col("species").is_not_null() & pl.col("genus").is_null()).is_empty()
    assert frame.filter(pl.col("genus").is_not_null() & pl.col("family").is_null()).is_empty()


FAMILY_DOWN = ("family", "subfamily", "tribe", "genus", "species")


def test_half_of_the_species_names_are_interim_and_all_begin_with_their_genus(many: Path) -> None:
    names = read_metadata(many / METADATA).select("genus", "species").drop_nulls().unique()
    assert 0.35 < names["species"].str.contains(r"\d|cf\.").mean() < 0.65  # type: ignore[operator]
    assert names.select((pl.col("species").str.split(" ").list.first() == pl.col("genus")).all()).item()


def test_what_is_labelled_is_true_and_a_taxon_has_one_parent(many: Path) -> None:
    frame, lineage = read_metadata(many / METADATA), table(many / "truth/lineage.tsv")
    assert lineage.null_count().sum_horizontal().item() == 0
    for rank in ("phylum", "class", "order", *FAMILY_DOWN):
        assert (frame[rank].is_null() | (frame[rank] == lineage[rank])).all()
    assert frame["uri"].to_list() == lineage["uri"].to_list()
    for above, rank in itertools.pairwise(("order", *FAMILY_DOWN)):
        assert lineage.select(above, rank).unique()[rank].is_unique().all()


def test_bins_do_not_nest_in_species_nor_species_in_bins(many: Path) -> None:
    pairs = table(many / "truth/lineage.tsv").select("uri", "species").unique()
    assert not pairs["uri"].is_unique().all()
    assert not pairs["species"].is_unique().all()
    assert table(many / "truth/lineage.tsv")["uri"].value_counts()["count"].mean() > 8  # type: ignore[operator]


def test_a_few_thousand_specimens_have_orders_enough_to_learn_from() -> None:
    tree = grow(2000, SynthesisSettings(specimens=2000).power, np.random.default_rng(1))
    counts = np.bincount(tree.lineage(tree.bin_species)["order"], weights=tree.bin_size)
    assert counts.sum() == 2000
    assert 8 <= (counts >= 30).sum() <= 12
    assert counts.max() == counts[0] > 600  # Diptera stay the bulk
    assert (counts[-3:] <= 2).all()  # too few for any experiment, as in life


def test_imbalance_0_makes_orders_equal() -> None:
    tree = grow(1605, 0.0, np.random.default_rng(1))
    counts = np.bincount(tree.lineage(tree.bin_species)["order"], weights=tree.bin_size)
    assert counts.tolist() == [100] * 16 + [2, 2, 1]


# Barcodes


def test_barcodes_translate_without_a_stop_by_biopython(many: Path) -> None:
    from Bio.Seq import Seq

    barcodes = read_metadata(many / METADATA)["nucraw"].unique().sort().to_list()[::40]
    assert len(barcodes) > 100
    for barcode in barcodes:
        coding = barcode[1 : 1 + (len(barcode) - 1) // 3 * 3]  # the frame starts at base 2
        protein = str(Seq(coding).translate(table=5))  # type: ignore[no-untyped-call]
        assert "*" not in protein
        assert protein.count("X") <= 2 + barcode.count("N") // 3 * 2


def test_most_barcodes_have_658_bases_and_a_minority_fewer_or_n(many: Path) -> None:
    barcodes = read_metadata(many / METADATA)["nucraw"]
    lengths = barcodes.str.len_bytes()
    assert (lengths.max(), lengths.min() >= 500) == (658, True)  # type: ignore[operator]
    assert 0.88 < (lengths == 658).mean() < 0.94  # type: ignore[operator]
    assert 0.05 < barcodes.str.contains("N").mean() < 0.1  # type: ignore[operator]
    assert barcodes.str.contains("^[ACGTN]+$").all()
    at = sum(b.count("A") + b.count("T") for b in barcodes) / sum(map(len, barcodes))
    assert 0.6 < at < 0.75  # barcodes of insects are about two thirds A and T


def test_barcode_distances_grow_with_the_rank(many: Path) -> None:
    whole = read_metadata(many / METADATA, ["sampleid", "nucraw"]).join(
        table(many / "truth/lineage.tsv"), on="sampleid"
    )
    whole = whole.filter(pl.col("nucraw").str.contains("^[ACGT]{658}$"))
    sites = np.frombuffer("".join(whole["nucraw"]).encode(), np.uint8).reshape(-1, 658)
    rng = np.random.default_rng(0)
    keys = {c: whole[c].rank("dense").to_numpy() for c in ("uri", "genus", "family", "order")}

    def distances(same: str | None, differ: str | None) -> Any:
        order = np.lexsort((rng.random(whole.height), keys[same])) if same else rng.permutation(whole.height)
        a, b = order[:-1], order[1:]
        kept = np.ones(len(a), dtype=bool)
        if same:
            kept &= keys[same][a] == keys[same][b]
        if differ:
            kept &= keys[differ][a] != keys[differ][b]
        a, b = a[kept][:2000], b[kept][:2000]
        return (sites[a] != sites[b]).mean(axis=1)

    within_bin = distances("uri", None)
    between = [
        distances(same, differ)
        for same, differ in (("genus", "uri"), ("family", "genus"), ("order", "family"), (None, "order"))
    ]
    assert within_bin.max() < 0.02
    assert (within_bin == 0).mean() > 0.1  # haplotypes are shared
    assert (between[0] > 0.022).mean() > 0.9
    means = [within_bin.mean(), *(d.mean() for d in between)]
    assert means == sorted(means)
    assert means[-1] > 0.15


# Pictures


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_boxes_and_masks_are_valid_coco_and_agree(clean: Path) -> None:
    from pycocotools import mask as masks
    from pycocotools.coco import COCO

    coco = COCO(str(clean / "truth/boxes.coco.json"))
    assert (len(coco.imgs), len(coco.anns)) == (263, 260)
    sampleids = read_metadata(clean / METADATA)["sampleid"].to_list()
    assert [i["sampleid"] for i in coco.imgs.values()][:260] == sampleids
    for image in coco.imgs.values():
        annotations = coco.imgToAnns[image["id"]]
        with Image.open(clean / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"])
        if image["file_name"].startswith("control_wells/"):
            assert annotations == []
            continue
        (annotation,) = annotations
        rle = coco.annToRLE(annotation)
        assert masks.toBbox(rle).tolist() == annotation["bbox"]
        assert masks.area(rle) == annotation["area"] == coco.annToMask(annotation).sum()
        assert annotation["area"] > 60


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_the_specimen_stands_out_from_its_well_in_the_written_picture(clean: Path) -> None:
    from pycocotools.coco import COCO

    coco = COCO(str(clean / "truth/boxes.coco.json"))
    for annotation in list(coco.anns.values())[::20]:
        mask = coco.annToMask(annotation).astype(bool)
        with Image.open(clean / coco.imgs[annotation["image_id"]]["file_name"]) as picture:
            grey = np.asarray(picture.convert("L"), dtype=float)
        x, y, w, h = annotation["bbox"]
        around = np.zeros_like(mask)
        around[max(0, y - 5) : y + h + 5, max(0, x - 5) : x + w + 5] = True
        assert grey[mask].mean() < grey[around & ~mask].mean() - 15


@pytest.mark.parametrize("order", list(PLANS))
def test_outside_of_its_mask_a_picture_is_the_empty_well(order: str) -> None:
    studio, light = Studio(), plate_light(np.random.default_rng(3))
    for seed in range(4):
        deviations = np.random.default_rng(seed).standard_normal(len(TRAITS), dtype=np.float32)
        subject = Subject(PLANS[order], deviations, np.random.default_rng(seed))
        picture, mask = studio.photograph(subject, light, np.random.default_rng([9, seed]))
        empty, nothing = studio.photograph(None, light, np.random.default_rng([9, seed]))
        assert not nothing.any()
        assert (picture[~mask] == empty[~mask]).all()
        assert (picture[mask] != empty[mask]).any(axis=-1).mean() > 0.85


def test_siblings_look_more_alike_than_strangers() -> None:
    from bioscan.data.synthesis_tree import inherit

    tree = grow(5000, 0.5, np.random.default_rng(0))
    traits = inherit(tree, len(TRAITS), np.random.default_rng(0))
    lineage = tree.lineage(np.arange(len(traits)))
    first, second = np.triu_indices(len(traits), 1)
    apart = np.square(traits[first] - traits[second]).mean(axis=1)
    means = [apart[lineage[r][first] == lineage[r][second]].mean() for r in ("genus", "family", "order")]
    assert means[0] < means[1] < means[2]


# Faults


def test_faults_are_exactly_those_listed(clean: Path, faulty: Path) -> None:
    """The same seed without faults is the oracle: what differs is what is listed."""
    faults = table(faulty / "truth/faults.tsv")
    # No family has two labelled species among so few; the test below has them.
    assert set(faults["kind"]) == set(FAULTS) - {"mislabelled_species"}
    assert faults["sampleid"].is_unique().all()
    listed: dict[str, set[str]] = {k: set() for k in FAULTS}
    for kind, sampleid in faults.select("kind", "sampleid").rows():
        listed[kind].add(sampleid)

    def some(*kinds: str) -> set[str]:
        return set().union(*(listed[k] for k in kinds))

    before, after = table(clean / METADATA), table(faulty / METADATA)
    again = ("duplicate_record", "leaked_specimen")
    differing = {c: set(before["sampleid"].filter(before[c] != after[c])) for c in before.columns}
    labels = {c: differing.pop(c) for c in ("name", "order", *FAMILY_DOWN)}
    barcodes = {c: differing.pop(c) for c in ("nucraw", "uri")}
    assert not set().union(*differing.values())
    wrong = ("mislabelled_order", "mislabelled_family", "mislabelled_species")
    taxa = (*wrong, "species_without_genus", "genus_in_two_families", "family_hole")
    assert set().union(*labels.values()) <= some(*taxa, *again)
    assert some(*taxa) <= set().union(*labels.values())
    assert listed["mislabelled_order"] <= labels["order"] <= some("mislabelled_order", *again)
    assert listed["mislabelled_species"] <= labels["species"]
    assert listed["genus_in_two_families"] <= labels["family"] - labels["genus"]
    assert listed["family_hole"] <= labels["family"] - labels["genus"]
    assert listed["species_without_genus"] <= labels["genus"] - labels["species"]
    swapped = some("swapped_barcode", *again)
    assert barcodes["uri"] == swapped
    assert barcodes["nucraw"] <= swapped
    truth_before, truth_after = table(clean / "truth/lineage.tsv"), table(faulty / "truth/lineage.tsv")
    moved = set(truth_before["sampleid"].filter(truth_before["uri"] != truth_after["uri"]))
    assert moved == some(*again)

    sampleid = dict(zip(before["image_file"], before["sampleid"], strict=True))
    package = "bioscan/images/original_256"
    old, new = digests(clean / package), digests(faulty / package)
    changed = {sampleid[Path(f).name] for f in old if old[f] != new.get(f)}
    broken = some("truncated_picture", "empty_picture", "not_a_picture", "missing_picture")
    assert changed == broken | some("duplicate_picture", *again)
    missing = {sampleid[Path(f).name] for f in old.keys() - new.keys()}
    assert missing == listed["missing_picture"]


def test_mislabelled_species_keep_their_family_and_every_share_is_planted(tmp_path: Path) -> None:
    out, count = tmp_path / "data", 20_000
    made = synthesize(out, SynthesisSettings(specimens=count, images=False, faults=True))["faults"]
    shares = {kind: share for kind, share in FAULTS.items() if not kind.endswith("picture")}
    twice = {"swapped_barcode": 2}  # both partners are listed
    wanted = {kind: round(share * count) * twice.get(kind, 1) for kind, share in shares.items()}
    assert made == pytest.approx(wanted, rel=0.05)
    frame = read_metadata(out / METADATA).join(
        table(out / "truth/lineage.tsv"), on="sampleid", suffix="_true"
    )
    wrong = table(out / "truth/faults.tsv").filter(pl.col("kind") == "mislabelled_species")
    rows = frame.join(wrong, on="sampleid")
    assert (rows["family"] == rows["family_true"]).all()
    assert (rows["species"] != rows["species_true"]).all()
    false = frame.filter(pl.any_horizontal(pl.col(r) != pl.col(f"{r}_true") for r in FAMILY_DOWN))
    faults = dict(table(out / "truth/faults.tsv").select("sampleid", "kind").rows())
    assert {faults[s] for s in false["sampleid"]} <= {*shares} - {"species_without_genus", "family_hole"}
    lost = frame.filter(pl.col("genus").is_null() & pl.col("species").is_not_null())
    assert {faults[s] for s in lost["sampleid"]} == {"species_without_genus"}


def test_every_detail_names_the_specimen_that_the_fault_came_from(faulty: Path) -> None:
    frame = read_metadata(faulty / METADATA)
    rows = {row["sampleid"]: row for row in frame.iter_rows(named=True)}
    files = {row["sampleid"]: f"part{row['chunk_number']}/{row['image_file']}" for row in rows.values()}
    picture = {s: faulty / "bioscan/images/original_256" / f for s, f in files.items()}
    lineage = {r["sampleid"]: r for r in table(faulty / "truth/lineage.tsv").iter_rows(named=True)}
    for kind, sampleid, detail in table(faulty / "truth/faults.tsv").iter_rows():
        other = re.search(r"BIOUG\d{5}-[A-H]\d\d", detail or "")
        if kind == "swapped_barcode":
            assert other
            assert rows[sampleid]["uri"] == lineage[other[0]]["uri"]
        elif kind in ("duplicate_record", "leaked_specimen"):
            assert other
            assert rows[sampleid]["nucraw"] == rows[other[0]]["nucraw"]
            assert lineage[sampleid]["plate"] != lineage[other[0]]["plate"]
            same = picture[sampleid].read_bytes() == picture[other[0]].read_bytes()
            assert same == (kind == "duplicate_record")
        elif kind == "duplicate_picture":
            assert other
            assert picture[sampleid].read_bytes() == picture[other[0]].read_bytes()
            assert lineage[sampleid]["uri"] != lineage[other[0]]["uri"]
        elif kind.startswith("mislabelled"):
            rank = kind.removeprefix("mislabelled_")
            assert rows[sampleid][rank] == rows[other[0]][rank] != lineage[sampleid][rank]  # type: ignore[index]
        elif kind.endswith("_picture") and kind != "missing_picture":
            with pytest.raises((OSError, UnidentifiedImageError)):  # noqa: SIM117
                with Image.open(picture[sampleid]) as image:
                    image.load()


def test_broken_pictures_are_the_same_in_every_package(faulty: Path) -> None:
    names = read_metadata(faulty / METADATA)["image_file"].to_list()
    found = []
    for path in ("bioscan/images/original_256", "original_256.zip", "original_256.hdf5"):
        images = Images(faulty / path, save_index=False)
        found.append([images.read(int(row)) if row >= 0 else None for row in images.find(names)])
    assert found[0] == found[1] == found[2]
    assert Counter(data is None for data in found[0])[True] == 1
    assert b"" in found[0]


# Equal bytes


def test_equal_settings_give_equal_bytes_whatever_the_workers(tmp_path: Path, faulty: Path) -> None:
    synthesize(tmp_path / "again", replace(SMALL, faults=True, workers=2))
    assert digests(tmp_path / "again") == digests(faulty)


def test_another_seed_gives_other_data(tmp_path: Path) -> None:
    for seed in (1, 2):
        synthesize(tmp_path / str(seed), SynthesisSettings(specimens=50, seed=seed, images=False))
    one, two = (table(tmp_path / str(seed) / METADATA) for seed in (1, 2))
    for column in ("sampleid", "uri", "nucraw"):
        assert set(one[column]).isdisjoint(two[column])


@settings(max_examples=15, deadline=None)
@given(
    specimens=st.integers(1, 400), seed=st.integers(0, 2**40), imbalance=st.floats(0, 1), faults=st.booleans()
)
def test_any_number_of_specimens_makes_a_readable_table(
    specimens: int, seed: int, imbalance: float, faults: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("any") / "data"
    chosen = SynthesisSettings(
        specimens=specimens, seed=seed, imbalance=imbalance, faults=faults, images=False
    )
    result = synthesize(out, chosen)
    frame = read_metadata(out / METADATA)
    assert frame.height == result["specimens"] == specimens
    assert frame["order"].null_count() == 0
    assert result["labelled"]["family"] == specimens - frame["family"].null_count()
    assert result["bins"] == table(out / "truth/lineage.tsv")["uri"].n_unique()
    assert sum(result["faults"].values()) == (table(out / "truth/faults.tsv").height if faults else 0)


def test_one_specimen_is_a_dataset_even_with_faults(tmp_path: Path) -> None:
    result = synthesize(tmp_path / "one", SynthesisSettings(specimens=1, faults=True))
    assert result["specimens"] == result["plates"] == 1
    assert read_metadata(tmp_path / "one" / METADATA).height == 1


# Requests that cannot be met, and kills


def test_an_existing_folder_is_refused_and_only_a_dataset_is_replaced(tmp_path: Path) -> None:
    few = SynthesisSettings(specimens=5, images=False)
    out = tmp_path / "data"
    synthesize(out, few)
    before = digests(out)
    with pytest.raises(RequestError, match="exists; choose another name or pass --overwrite"):
        synthesize(out, few)
    assert digests(out) == before
    synthesize(out, replace(few, specimens=6), overwrite=True)
    assert read_metadata(out / METADATA).height == 6
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter1.tex").write_text("years of work")
    with pytest.raises(RequestError, match="is no artificial dataset; it is not replaced"):
        synthesize(tmp_path / "thesis", few, overwrite=True)
    assert (tmp_path / "thesis/chapter1.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"specimens": 0}, "specimens is 0; it must be from 1 to 5,000,000"),
        ({"specimens": 6_000_000}, "specimens is 6000000"),
        ({"seed": -1}, "seed is -1"),
        ({"imbalance": 1.5}, "imbalance is 1.5; it must be from 0 to 1"),
        ({"part_size": 0}, "part_size is 0"),
        ({"workers": 0}, "workers is 0"),
        ({"images": False, "zip": True}, "a ZIP or HDF5 package holds pictures"),
    ],
)
def test_settings_out_of_range_are_told(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        SynthesisSettings(**wrong)


def test_the_verb_writes_tells_and_refuses(
    tmp_path: Path, run_bioscan: Callable[..., tuple[int, str, str]]
) -> None:
    out = tmp_path / "data"
    command = ("synthesize", out, "--specimens", 120, "--seed", 3, "--no-images", "--faults")
    status, shown, _ = run_bioscan(*command)
    assert status == 0
    assert shown.startswith("120 specimens: ")
    assert "planted: 1 mislabelled order" in shown
    status, shown, said = run_bioscan(*command)
    assert (status, shown) == (2, "")
    assert "exists" in said
    status, shown, _ = run_bioscan(*command, "--overwrite", "--json")
    result = json.loads(shown)
    assert (status, result["specimens"], result["images"]) == (0, 120, None)
    assert result["metadata"] == str(out / METADATA)
    status, _, said = run_bioscan("synthesize", tmp_path / "x", "--specimens", -4)
    assert (status, "specimens is -4" in said) == (2, True)
    assert not (tmp_path / "x").exists()


def test_a_kill_in_the_middle_leaves_nothing_half_written(tmp_path: Path) -> None:
    out = tmp_path / "data"
    command = [
        sys.executable,
        "-m",
        "bioscan",
        "synthesize",
        str(out),
        "--specimens",
        "3000",
        "--workers",
        "1",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 40
    while not list(tmp_path.glob(".data.*.partial/bioscan/images/original_256/part1/*.jpg")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not out.exists()
    synthesize(out, SynthesisSettings(specimens=5, images=False))
    assert read_metadata(out / METADATA).height == 5


def test_a_script_without_a_main_guard_is_told_how_to_go_on(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from bioscan.data.synthesis import *\n"
        f"synthesize({str(tmp_path / 'data')!r}, SynthesisSettings(specimens=60, workers=2))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "__main__" in done.stderr.splitlines()[-1]
    assert "workers=1" in done.stderr.splitlines()[-1]
    assert [p.name for p in tmp_path.iterdir()] == ["script.py"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_metadata_of_the_published_size_takes_less_than_a_gigabyte(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from bioscan.data.synthesis import *\n"
        "synthesize(sys.argv[1], SynthesisSettings(specimens=1_128_313, images=False))\n"
        "status = Path('/proc/self/status').read_text()\n"
        "print(status.partition('VmHWM:')[2].split()[0])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "full")], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 1_000_000  # kB
    assert 1.1e9 < (tmp_path / "full" / METADATA).stat().st_size < 1.3e9
