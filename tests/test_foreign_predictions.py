"""Predictions of pybioclip, timm, SpeciesNet, MegaDetector, and plain tables, in files as they write them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bioscan.data.foreign import catalogue_files, from_table
from bioscan.data.predictions import read_predictions, read_record, read_scores
from bioscan.errors import BioscanError, DataError, RequestError
from bioscan.jobs.evaluate import evaluate

PYBIOCLIP = """\
file_name,kingdom,phylum,class,order,family,genus,species_epithet,species,common_name,score
photos/a.jpg,Animalia,Arthropoda,Insecta,Diptera,Sciaridae,Bradysia,ocellaris,Bradysia ocellaris,,0.25
photos/a.jpg,Animalia,Arthropoda,Insecta,Diptera,Sciaridae,Lycoriella,,Lycoriella ,,0.5
photos/a.jpg,Animalia,Arthropoda,Insecta,Diptera,Sciaridae,Bradysia,difformis,Bradysia difformis,"a, b",0.125
photos/b.jpg,Animalia,Arthropoda,Insecta,Hemiptera,Aphididae,Aphis,fabae,Aphis fabae,bean aphid,0.75
photos/b.jpg,Animalia,Arthropoda,Insecta,Hemiptera,Aphididae,Aphis,gossypii,Aphis gossypii,,0.75
"""

FLY = "11111111-2222-3333-4444-555555555555;insecta;diptera;sciaridae;bradysia;ocellaris;fungus gnat"
FLIES = "66666666-2222-3333-4444-555555555555;insecta;diptera;;;;fly"
BLANK = "f1856211-cfb7-4a5b-9158-c0f72fd09ee6;;;;;;blank"
NO_RESULT = "f2efdae9-efb8-48fb-8a91-eccf79ab4ffb" + 6 * ";no cv result"


def written(folder: Path, name: str, content: object) -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def columns(frame: pl.DataFrame) -> dict[str, list[Any]]:
    return frame.to_dict(as_series=False)


# -- tables


def test_of_pybioclips_rows_the_best_of_each_photograph_is_taken(tmp_path: Path) -> None:
    found = read_predictions(written(tmp_path, "p.csv", PYBIOCLIP))
    assert columns(found) == {
        "image_file": ["photos/a.jpg", "photos/b.jpg"],
        "phylum": ["Arthropoda"] * 2,
        "class": ["Insecta"] * 2,
        "order": ["Diptera", "Hemiptera"],
        "family": ["Sciaridae", "Aphididae"],
        "genus": ["Lycoriella", "Aphis"],
        "species": [None, "Aphis fabae"],  # without an epithet there is no species; of equal scores the first
        "species_probability": [0.5, 0.75],
    }
    assert read_record(tmp_path / "p.csv") == {}
    assert read_scores(tmp_path / "p.csv") is None


def test_pybioclips_prediction_of_a_rank_ends_there(tmp_path: Path) -> None:
    text = "file_name,kingdom,phylum,class,order,score\nb.jpg,Animalia,Arthropoda,Insecta,Diptera,0.875\n"
    found = read_predictions(written(tmp_path, "p.csv", text))
    assert columns(found.select("order", "order_probability")) == {
        "order": ["Diptera"],
        "order_probability": [0.875],
    }


@pytest.mark.parametrize(
    ("header", "key"),
    [
        ("file_name,classification,score", "image_file"),  # pybioclip, labels of one's own
        ("filename,label,prob", "image_file"),  # timm
        ("sampleid,label,score", "sampleid"),
        ("image_file,label,confidence", "image_file"),
    ],
)
def test_bare_labels_are_names_at_the_rank_that_is_told(tmp_path: Path, header: str, key: str) -> None:
    rows = "\na,Diptera,0.5\nb,Hemiptera,0.25\nb,Diptera,0.75\nc,not_classified,\n"
    path = written(tmp_path, "p.csv", header + rows)
    assert columns(read_predictions(path, rank="order")) == {
        key: ["a", "b", "c"],
        "order": ["Diptera", "Diptera", None],
        "order_probability": [0.5, 0.75, None],
    }
    label = header.split(",")[1]
    with pytest.raises(
        RequestError, match=rf"p\.csv: of which rank are the names in '{label}'\? Say it: --rank"
    ):
        read_predictions(path)
    with pytest.raises(RequestError, match="unknown rank 'ordr'; did you mean 'order'"):
        read_predictions(path, rank="ordr")


def test_labels_need_no_score_but_without_it_one_row_each(tmp_path: Path) -> None:
    path = written(tmp_path, "p.csv", "sampleid,label\na,Diptera\nb,\n")
    assert columns(read_predictions(path, "order")) == {"sampleid": ["a", "b"], "order": ["Diptera", None]}
    path = written(tmp_path, "q.csv", "sampleid,label\na,Diptera\na,Hemiptera\n")
    with pytest.raises(DataError, match="sampleid occurs more than once: a"):
        read_predictions(path, "order")


@pytest.mark.parametrize(
    "text",
    [
        "filename,index,label,prob\na.jpg,3,Diptera,0.5\nb.jpg,1,bee's,0.25\n",
        "filename,label_0,label_1,prob_0,prob_1\na.jpg,Diptera,fly,0.5,0.1\nb.jpg,bee's,x,0.25,0.2\n",
        # --topk 2: pandas writes NumPy's print of the arrays
        "filename,index,label,prob\na.jpg,[3 1],['Diptera' 'fly'],[0.5 0.1]\n"
        'b.jpg,[1 2],"[""bee\'s"" \'x\']","[2.5e-01\n 2.0e-01]"\n',
    ],
)
def test_of_timms_best_classes_the_first_is_taken(tmp_path: Path, text: str) -> None:
    found = read_predictions(written(tmp_path, "p.csv", text), rank="order")
    assert columns(found) == {
        "image_file": ["a.jpg", "b.jpg"],
        "order": ["Diptera", "bee's"],
        "order_probability": [0.5, 0.25],
    }


def test_timms_parquet_is_read_like_its_csv(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    frame = pl.DataFrame({"label": [["Diptera", "x"]], "prob": [[0.5, 0.25]], "filename": ["a.jpg"]})
    frame.write_parquet(path)
    found = read_predictions(path, rank="order")
    assert found.row(0) == ("a.jpg", "Diptera", 0.5)


def test_numbers_of_classes_are_no_names(tmp_path: Path) -> None:
    path = written(tmp_path, "p.csv", "filename,index,prob\na.jpg,3,0.5\n")
    with pytest.raises(DataError, match=r"'index' has numbers of classes.*--label-type name"):
        read_predictions(path, "order")


@pytest.mark.parametrize("value", ["1.5", "-3.25", "nan", "high"])
def test_a_score_that_is_no_probability_says_which(tmp_path: Path, value: str) -> None:
    path = written(tmp_path, "p.csv", f"sampleid,label,score\na,Diptera,0.5\nb,Diptera,{value}\n")
    with pytest.raises(DataError, match=rf"score of b is {value}, expected a probability from 0 to 1"):
        read_predictions(path, "order")


def test_our_own_tables_are_left_as_they_are(tmp_path: Path) -> None:
    # a column of ours that a tool also has, and one that looks like another tool's
    text = "sampleid,image_file,order,order_probability,score,label\na,x/a.jpg,Diptera,0.5,9,[z]\n"
    found = read_predictions(written(tmp_path, "p.csv", text), rank="family")
    assert found.columns == text.splitlines()[0].split(",")
    assert found.row(0) == ("a", "x/a.jpg", "Diptera", 0.5, "9", "[z]")


def test_a_table_of_ranks_by_file_name_keeps_their_probabilities(tmp_path: Path) -> None:
    text = "filename,order,family,order_probability,family_probability,error\na.jpg,Diptera,,0.5,,late\n"
    found = read_predictions(written(tmp_path, "p.csv", text))
    assert columns(found) == {
        "image_file": ["a.jpg"],
        "order": ["Diptera"],
        "family": [None],
        "order_probability": [0.5],
        "family_probability": [None],
        "error": ["late"],
    }


def test_a_table_of_nothing_that_is_known_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no key column, sampleid or image_file"):
        read_predictions(written(tmp_path, "p.csv", "name,label\na,b\n"), "order")
    with pytest.raises(DataError, match="no key column"):
        read_predictions(written(tmp_path, "q.csv", "file_name,taxon\na,b\n"), "order")


# -- SpeciesNet


def speciesnet(*entries: dict[str, Any]) -> dict[str, Any]:
    return {"predictions": [{"model_version": "4.0.1a"} | entry for entry in entries]}


def test_speciesnets_prediction_is_a_path_of_names_down_to_its_deepest_rank(tmp_path: Path) -> None:
    made = speciesnet(
        {
            "filepath": "photos/a.jpg",
            "country": "CAN",
            "classifications": {"classes": [FLIES, FLY], "scores": [0.6, 0.3]},
            "detections": [{"category": "1", "label": "animal", "conf": 0.9, "bbox": [0, 0, 1, 1]}],
            "prediction": FLY,
            "prediction_score": 0.75,
            "prediction_source": "classifier",
        },
        {"filepath": "photos/b.jpg", "prediction": FLIES, "prediction_score": 0.5},
        {"filepath": "photos/c.jpg", "prediction": BLANK, "prediction_score": 0.875},
        {"filepath": "photos/d.jpg", "prediction": NO_RESULT, "prediction_score": 0.25},
        {"filepath": "photos/e.jpg", "failures": ["CLASSIFIER", "DETECTOR"]},
        {"filepath": "photos/f.jpg", "classifications": {"classes": [FLIES, FLY], "scores": [0.6, 0.3]}},
        {
            "filepath": "photos/g.jpg",
            "failures": ["GEOLOCATION"],
            "prediction": FLIES,
            "prediction_score": 0.5,
        },
    )
    found = read_predictions(written(tmp_path, "p.json", made))
    assert columns(found) == {
        "image_file": [f"photos/{letter}.jpg" for letter in "abcdefg"],
        "class": ["Insecta", "Insecta", None, None, None, "Insecta", "Insecta"],
        "order": ["Diptera", "Diptera", None, None, None, "Diptera", "Diptera"],
        "family": ["Sciaridae", *[None] * 6],
        "genus": ["Bradysia", *[None] * 6],
        "species": ["Bradysia ocellaris", *[None] * 6],
        "class_probability": [None] * 7,
        "order_probability": [None, 0.5, None, None, None, 0.6, 0.5],
        "family_probability": [None] * 7,
        "genus_probability": [None] * 7,
        "species_probability": [0.75, *[None] * 6],
        "error": [*[None] * 4, "failed: CLASSIFIER, DETECTOR", None, None],
    }


def test_a_speciesnet_file_of_failures_only_is_read(tmp_path: Path) -> None:
    made = speciesnet({"filepath": "a.jpg", "failures": ["DETECTOR"]})
    found = read_predictions(written(tmp_path, "p.json", made), rank="order")
    assert columns(found.select("order", "error")) == {"order": [None], "error": ["failed: DETECTOR"]}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "prediction 2: no 'filepath'"),
        ({"filepath": "b.jpg", "prediction": "fly", "prediction_score": 0.5}, "prediction 2: cannot be used"),
        (
            {"filepath": "b.jpg", "prediction": FLY, "prediction_score": "high"},
            "prediction 2: cannot be used",
        ),
        (
            {"filepath": "b.jpg", "prediction": FLY, "prediction_score": 1.5},
            "species_probability of b.jpg is 1.5",
        ),
        ({"filepath": "b.jpg", "classifications": {"classes": [], "scores": []}}, "prediction 2: cannot be"),
        ({"filepath": "a.jpg"}, "image_file occurs more than once: a.jpg"),
    ],
)
def test_an_entry_of_speciesnet_that_cannot_be_used_says_which(
    tmp_path: Path, entry: dict[str, Any], message: str
) -> None:
    good = {"filepath": "a.jpg", "prediction": FLY, "prediction_score": 0.5}
    with pytest.raises(DataError, match=message):
        read_predictions(written(tmp_path, "p.json", speciesnet(good, entry)))


# -- MegaDetector


def detection(conf: float, *classes: tuple[str, float]) -> dict[str, Any]:
    made: dict[str, Any] = {"category": "1", "conf": conf, "bbox": [0.1, 0.1, 0.5, 0.5]}
    return made | ({"classifications": [list(pair) for pair in classes]} if classes else {})


def megadetector(images: Sequence[Mapping[str, Any]], **changes: Any) -> dict[str, Any]:
    return {
        "info": {"format_version": "1.6", "detector": "MDV5A"},
        "detection_categories": {"1": "animal", "2": "person", "3": "vehicle"},
        "classification_categories": {"0": "Diptera", "7": "Hemiptera"},
        "images": images,
    } | changes


def test_of_megadetectors_detections_the_most_certain_classified_one_counts(tmp_path: Path) -> None:
    images: list[dict[str, Any]] = [
        {"file": "x\\a.jpg", "detections": [detection(0.9), detection(0.5, ("7", 0.75), ("0", 0.25))]},
        {"file": "b.jpg", "detections": [detection(0.2, ("7", 0.9)), detection(0.8, ("0", 0.5), ("7", 0.4))]},
        {"file": "c.jpg", "detections": []},
        {"file": "d.jpg", "failure": "Failure image access", "detections": None},
        {"file": "e.jpg", "failure": None, "detections": [detection(0.9)]},
    ]
    path = written(tmp_path, "p.json", megadetector(images))
    assert columns(read_predictions(path, rank="order")) == {
        "image_file": ["x\\a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg"],
        "order": ["Hemiptera", "Diptera", None, None, None],
        "order_probability": [0.75, 0.5, None, None, None],
        "error": [None, None, None, "Failure image access", None],
    }
    with pytest.raises(RequestError, match="of which rank are the names in 'classification_categories'"):
        read_predictions(path)


def test_megadetectors_categories_that_are_described_need_no_rank(tmp_path: Path) -> None:
    made = megadetector(
        [
            {"file": "a.jpg", "detections": [detection(0.9, ("0", 0.75))]},
            {"file": "b.jpg", "detections": [detection(0.9, ("7", 0.5))]},
        ],
        classification_category_descriptions={"0": FLY, "7": BLANK},
    )
    found = read_predictions(written(tmp_path, "p.json", made))
    assert found["species"].to_list() == ["Bradysia ocellaris", None]
    assert found["species_probability"].to_list() == [0.75, None]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (megadetector([], classification_categories={}), "MegaDetector alone says animal, person or vehicle"),
        (megadetector([]), "no rows"),
        (megadetector([{"detections": []}]), "image 1: no 'file'"),
        (megadetector([{"file": "a", "detections": [detection(0.5, ("9", 0.5))]}]), "image 1: no '9'"),
        (
            megadetector([{"file": "a", "detections": [{"classifications": [["0", 1]]}]}]),
            "image 1: no 'conf'",
        ),
        (megadetector([{"file": "a", "detections": []}]), "no entry names a taxon"),
        (megadetector([{"file": "a", "detections": 3}]), "image 1: cannot be used"),
        ([{"file": "a.jpg", "detections": []}], "neither SpeciesNet's JSON"),
        ({"annotations": []}, "neither SpeciesNet's JSON"),
        ('{"images": [', "cannot be read as predictions"),
        ("", "cannot be read as predictions"),
    ],
)
def test_json_that_cannot_be_used_says_why(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_predictions(written(tmp_path, "p.json", content), rank="order")


# -- names of files


def test_a_path_is_the_file_of_the_catalogue_that_it_ends_in() -> None:
    files = pl.Series(
        "image_file", ["/data/photos/part1/a.jpg", "C:\\x\\b.jpg", "c.jpg", "z/other.jpg", "ab.jpg"]
    )
    known = pl.Series(["part1/a.jpg", "b.jpg", "c.jpg", "d.jpg", None])
    found = catalogue_files(files, known)
    assert found.to_list() == ["part1/a.jpg", "b.jpg", "c.jpg", "z/other.jpg", "ab.jpg"]
    assert found.name == "image_file"


def test_the_longest_ending_decides() -> None:
    known = pl.Series(["part1/a.jpg", "a.jpg"])
    found = catalogue_files(pl.Series(["x/part1/a.jpg", "x/part2/a.jpg"]), known)
    assert found.to_list() == ["part1/a.jpg", "a.jpg"]


def test_two_paths_of_one_file_name_are_an_error() -> None:
    with pytest.raises(DataError, match=r"x/a\.jpg, y/a\.jpg are all of 'a\.jpg'"):
        catalogue_files(pl.Series(["x/a.jpg", "b.jpg", "y/a.jpg"]), pl.Series(["a.jpg", "b.jpg"]))


NAMES = st.sampled_from(["a.jpg", "b.jpg", "p/a.jpg", "q/a.jpg", "p/q/a.jpg"])


@settings(max_examples=60, deadline=None)
@given(st.lists(NAMES, min_size=1, max_size=5, unique=True), st.lists(NAMES, max_size=4))
def test_matching_paths_is_that_of_a_loop_over_endings(files: list[str], known: list[str]) -> None:
    expected = [
        next(
            ("/".join(name.split("/")[i:]) for i in range(3) if "/".join(name.split("/")[i:]) in known), name
        )
        for name in files
    ]
    matched = [name for name in expected if name in known]
    series = pl.Series(files, dtype=pl.String), pl.Series(known, dtype=pl.String)
    if len(set(matched)) < len(matched):
        with pytest.raises(DataError, match="keep one of them"):
            catalogue_files(*series)
    else:
        assert catalogue_files(*series).to_list() == expected


# -- a law


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 8)), min_size=1, max_size=20))
def test_the_best_row_of_a_photograph_is_that_of_a_loop(rows: list[tuple[int, int, int]]) -> None:
    table = pl.DataFrame(
        {
            "filename": [f"{file}.jpg" for file, _, _ in rows],
            "label": [f"taxon {label}" for _, label, _ in rows],
            "prob": [str(score / 8) for _, _, score in rows],
        }
    )
    best: dict[str, tuple[float, str]] = {}
    for file, label, score in rows:
        if f"{file}.jpg" not in best or score / 8 > best[f"{file}.jpg"][0]:
            best[f"{file}.jpg"] = (score / 8, f"taxon {label}")
    found = from_table(table, "a table", "genus")
    assert found.rows() == [(file, label, score) for file, (score, label) in best.items()]


# -- through the evaluation


def test_other_tools_predictions_are_evaluated_by_the_endings_of_their_paths(tmp_path: Path) -> None:
    catalogue = pl.DataFrame(
        {
            "sampleid": ["a", "b", "c"],
            "image_file": ["1.jpg", "2.jpg", "3.jpg"],
            "order": ["Diptera", "Diptera", "Odonata"],
        }
    )
    bioclip = tmp_path / "bioclip.csv"
    bioclip.write_text(
        "file_name,kingdom,phylum,class,order,score\n"
        "photos/1.jpg,Animalia,Arthropoda,Insecta,Diptera,0.9\n"
        "photos/1.jpg,Animalia,Arthropoda,Insecta,Odonata,0.1\n"
        "photos/3.jpg,Animalia,Arthropoda,Insecta,Diptera,0.6\n"
    )
    plain = tmp_path / "plain.csv"
    plain.write_text("sampleid,label,score\na,Diptera,0.9\nc,Diptera,0.6\n")
    for path in (bioclip, plain):
        found = evaluate(path, catalogue, rank="order")
        assert (found.n, found.metrics["top_1"]["micro"].value) == (2, 0.5), path
        assert found.counts["not_predicted"] == 1
        assert found.specimens["probability"].to_list() == [0.9, 0.6]
    with pytest.raises(BioscanError, match="Say it: --rank"):
        evaluate(plain, catalogue)
