"""Box tables: round trips through every form, real annotations, and bad input told where it stands."""

import contextlib
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from bioscan.data.boxes import (
    FORMS,
    SCHEMA,
    XYXY,
    Finding,
    check_boxes,
    find_pictures,
    finding_rows,
    pictures,
    read_boxes,
    row_finding,
    write_boxes,
)
from bioscan.errors import DataError, RequestError

NFD, NFC = unicodedata.normalize("NFD", "fliegé.jpg"), unicodedata.normalize("NFC", "fliegé.jpg")


def table(rows: list[dict[str, Any]]) -> pl.DataFrame:
    return check_boxes(pl.DataFrame(rows, SCHEMA, orient="row"))


def row(name: str, *box: float, **more: Any) -> dict[str, Any]:
    return dict.fromkeys(SCHEMA) | {"image_file": name} | dict(zip(XYXY, box, strict=False)) | more


def dataset(*boxes: list[Any], size: tuple[int, int] = (1024, 768), **more: Any) -> dict[str, Any]:
    """A COCO dataset of one image and these boxes."""
    return {
        "images": [{"id": 7, "file_name": "a.jpg", "width": size[0], "height": size[1]}],
        "annotations": [
            {"id": n, "image_id": 7, "category_id": 0, "bbox": box} for n, box in enumerate(boxes, 1)
        ],
        "categories": [{"id": 0, "name": "insect"}],
    } | more


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Write text or JSON to a file of this name."""

    def save(name: str, content: Any) -> Path:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return save


# -- round trips

numbers = st.floats(0, 3000).map(lambda value: round(value, 3)) | st.floats(0, 3000)
names = st.text(
    st.characters(codec="utf-8", exclude_characters="/\\\0\r\n", exclude_categories=["Cc"]), min_size=1
)


@st.composite
def tables(draw: st.DrawFn) -> pl.DataFrame:
    """A table of up to four pictures: none, one or many boxes, sizes, scores and masks known or not."""
    rows: list[dict[str, Any]] = []
    for name in draw(
        st.lists(names, min_size=1, max_size=4, unique_by=lambda n: unicodedata.normalize("NFC", n))
    ):
        kind = draw(st.sampled_from(["none", "one", "many"]))
        picture = {"part": draw(st.none() | st.integers(0, 113)), "kind": kind}
        picture |= draw(st.sampled_from([{}, {"width": 6001, "height": 6001}]))
        scores = sorted(draw(st.lists(st.floats(0, 1), min_size=1, max_size=3)), reverse=True)
        for number, score in enumerate(scores if kind == "many" else scores[:1]):
            x, y = draw(numbers), draw(numbers)
            box = [
                x,
                y,
                *draw(st.tuples(*[st.floats(n + 1, 6000) | st.just(n + draw(numbers) + 1) for n in (x, y)])),
            ]
            told = {"number": number, "score": draw(st.sampled_from([None, score]))}
            if number == 0 and draw(st.booleans()):
                told |= {"area_px": (box[2] - box[0]) * (box[3] - box[1]) * draw(st.floats(0.1, 0.9))}
                told |= {"length_px": draw(numbers), "length_mm": draw(numbers)}
            rows.append(
                row(
                    f"{name}.jpg",
                    *(() if kind == "none" else box),
                    **picture,
                    **(told if kind != "none" else {}),
                )
            )
    return table(rows)


@settings(max_examples=60, deadline=None)
@given(tables(), st.sampled_from(["parquet", "csv", "coco"]))
def test_what_is_written_is_read_back_to_the_last_bit(
    tmp_path_factory: pytest.TempPathFactory, frame: pl.DataFrame, form: str
) -> None:
    path = tmp_path_factory.mktemp("trip") / f"boxes{FORMS[form]}"
    write_boxes(frame, path, record={"settings": 1})
    last_bit = 1e-12 if form == "coco" else 0.0
    assert_frame_equal(read_boxes(path), frame, rel_tol=0, abs_tol=last_bit)


@settings(max_examples=30, deadline=None)
@given(tables())
def test_bioscan_5m_keeps_the_specimens_boxes_and_a_result_list_all_boxes(
    tmp_path_factory: pytest.TempPathFactory, frame: pl.DataFrame
) -> None:
    folder = tmp_path_factory.mktemp("trip")
    kept = pictures(frame).filter(pl.col("x0").is_not_null())
    write_boxes(frame, folder / "boxes.tsv")
    if kept["image_file"].is_duplicated().any():  # part folders are lost
        return
    columns = ["image_file", "width", "height", *XYXY]
    assert_frame_equal(
        read_boxes(folder / "boxes.tsv").select(columns), kept.select(columns), check_exact=True
    )
    write_boxes(frame, folder / "all.json")
    write_boxes(frame, folder / "results.json", form="coco-results")
    back = read_boxes(folder / "results.json", images=folder / "all.json")
    boxes = frame.filter(pl.col("x0").is_not_null()).with_columns(pl.col("score").fill_null(1.0))
    columns = ["image_file", "part", *XYXY, "score"]
    given, told = (f.filter(pl.col("x0").is_not_null()).select(columns) for f in (boxes, back))
    assert_frame_equal(told, given, rel_tol=0, abs_tol=1e-12, check_row_order=False)


def test_real_annotations_go_through_every_form_and_stay_as_published(shared: Path, tmp_path: Path) -> None:
    source = shared / "data" / "bioscan_crop" / "annotations_coco.json"
    frame = read_boxes(source)
    assert frame["kind"].value_counts(sort=True).rows() == [("one", 451), ("none", 198)]
    for name in ("boxes.parquet", "boxes.csv", "boxes.json"):
        write_boxes(frame, tmp_path / name)
        assert_frame_equal(read_boxes(tmp_path / name), frame, check_exact=True)
    published = {a["image_id"]: a for a in json.loads(source.read_bytes())["annotations"]}
    write_boxes(frame, tmp_path / "same_ids.json", images=source)
    ours = json.loads((tmp_path / "same_ids.json").read_bytes())["annotations"]
    assert {a["image_id"] for a in ours} == set(published)
    for annotation in ours:
        theirs = published[annotation["image_id"]]
        np.testing.assert_allclose(annotation["bbox"], theirs["bbox"], rtol=0, atol=1e-12)
        assert annotation["area"] == theirs["area"]


def test_toras_zero_boxes_are_pictures_without_a_specimen(shared: Path) -> None:
    """The published TORAS file has a box of four zeros for each of the 198 empties, and no areas."""
    folder = shared / "data" / "bioscan_crop"
    coco, toras = (read_boxes(folder / f"annotations_{n}.json") for n in ("coco", "toras_raw"))
    columns = ["image_file", "kind", "number", *XYXY]
    assert_frame_equal(toras.select(columns), coco.select(columns))
    # areas of the COCO file are rounded to two decimals: it took the polygons' area by the shoelace formula
    assert (toras["area_px"] - coco["area_px"]).abs().max() < 0.00501  # type: ignore[operator]


def test_scale_and_area_of_bioscan_5m_follow_from_the_box(shared: Path, tmp_path: Path) -> None:
    """25 real records: the scale is the box's shorter side over 256, the area its share of 1024 x 768."""
    records = pl.read_csv(
        shared / "data" / "bioscan_records" / "bioscan5m_25_records_no_sequence.tsv", separator="\t"
    )
    x0, x1, y1, y0 = (records["bbox_x0_x1_y1_y0"].str.split(",").list.get(n).cast(float) for n in range(4))
    given = {"processid": records["processid"], "width_original": 1024, "height_original": 768}
    frame = pl.DataFrame(given | {"x0": x0, "y0": y0, "x1": x1, "y1": y1, "scale_factor": 0.0})
    frame.write_csv(tmp_path / "given.tsv", separator="\t")
    write_boxes(read_boxes(tmp_path / "given.tsv"), tmp_path / "made.tsv")
    made = pl.read_csv(tmp_path / "made.tsv", separator="\t")
    assert made.columns[:3] == ["processid", "width_original", "height_original"]
    assert made.columns[3:] == ["x0", "y0", "x1", "y1", "scale_factor", "area_fraction"]
    assert made["processid"].to_list() == records["processid"].to_list()
    for ours, published in (
        ("scale_factor", "cropped_scale_factor"),
        ("area_fraction", "cropped_area_fraction"),
    ):
        np.testing.assert_allclose(made[ours], records[published], rtol=0, atol=5.001e-5)  # four decimals
    assert ((x1 - x0) < (y1 - y0)).sum() == 16  # so it is the shorter side, not the height


# -- COCO


def test_areas_of_polygons_and_of_both_kinds_of_rle_are_those_of_the_mask(saved: Callable[..., Path]) -> None:
    from pycocotools import mask

    picture = np.zeros((40, 50), np.uint8, order="F")
    picture[5:25, 10:30] = 1
    picture[8:12, 30:41] = 1
    packed = mask.encode(picture)
    flat = picture.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat, prepend=0, append=0))  # zeros first
    runs = np.diff(edges, prepend=0).tolist()
    masks: list[Any] = [
        [[10, 5, 30, 5, 30, 25, 10, 25], [30, 8, 41, 8, 41, 12, 30, 12]],
        {"size": [40, 50], "counts": runs},
        {"size": [40, 50], "counts": packed["counts"].decode()},
        [],
    ]
    content = dataset(*[[10, 5, 31, 20]] * 4, size=(50, 40))
    for annotation, segmentation in zip(content["annotations"], masks, strict=True):
        annotation["segmentation"] = segmentation
    expected = float(mask.area(packed))
    assert expected == 444
    assert read_boxes(saved("a.json", content))["area_px"].to_list() == [expected] * 3 + [None]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_compressed_rle_of_any_mask_has_the_area_that_pycocotools_counts(seed: int) -> None:
    from pycocotools import mask

    from bioscan.data.coco import _rle_counts

    random = np.random.default_rng(seed)
    shape = random.integers(1, 300, 2)
    picture = np.asfortranarray(random.uniform(size=shape) < random.uniform() ** 3, np.uint8)
    packed = mask.encode(picture)
    counts = _rle_counts(packed["counts"].decode())
    assert sum(counts[1::2]) == mask.area(packed) == picture.sum()
    assert sum(counts) == picture.size


def test_a_coco_file_we_write_is_one_that_pycocotools_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pycocotools.coco import COCO

    frame = table(
        [
            row("a.jpg", 1, 2, 31.5, 42, part=3, kind="many", number=0, score=0.9, width=64, height=48),
            row("a.jpg", 5, 2, 30, 40, part=3, kind="many", number=1, score=0.4, width=64, height=48),
            row("b.jpg", kind="none", width=64, height=48),
        ]
    )
    write_boxes(frame, tmp_path / "truth.json")
    write_boxes(frame, tmp_path / "results.json", form="coco-results")
    made = COCO(str(tmp_path / "truth.json"))
    results = made.loadRes(str(tmp_path / "results.json"))
    capsys.readouterr()
    assert [image["file_name"] for image in made.dataset["images"]] == ["part3/a.jpg", "b.jpg"]
    assert [a["bbox"] for a in results.dataset["annotations"]] == [[1, 2, 30.5, 40], [5, 2, 25, 38]]
    assert [a["area"] for a in made.dataset["annotations"]] == [30.5 * 40, 25 * 38]


def test_file_names_lose_their_part_folder_and_keep_others(saved: Callable[..., Path]) -> None:
    content = {
        "images": [
            {"id": 1, "file_name": "bioscan/images/original_full/part18/a.jpg"},
            {"id": 2, "file_name": "train\\b.jpg"},
            {"id": "x", "file_name": f"part2/{NFD}"},
        ],
        "annotations": [],
    }
    frame = read_boxes(saved("a.json", content))
    assert frame.select("image_file", "part", "kind").rows() == [
        ("a.jpg", 18, "none"),
        ("train/b.jpg", None, "none"),
        (NFC, 2, "none"),
    ]


def test_a_result_list_is_ordered_by_score_and_says_nothing_of_many(saved: Callable[..., Path]) -> None:
    entries = [
        {"image_id": "b.jpg", "bbox": [0, 0, 5, 5], "score": 0.2},
        {"image_id": "a.jpg", "bbox": [0, 0, 9, 9], "score": 0.3},
        {"image_id": "b.jpg", "bbox": [1, 1, 5, 5], "score": 0.8},
        {"image_id": "b.jpg", "bbox": [2, 2, 5, 5], "score": 0.8},
    ]
    frame = read_boxes(saved("results.json", entries))
    assert frame.select("image_file", "kind", "number", "x0").rows() == [
        ("b.jpg", "one", 0, 1.0),
        ("b.jpg", "one", 1, 2.0),
        ("b.jpg", "one", 2, 0.0),
        ("a.jpg", "one", 0, 0.0),
    ]


def test_ids_of_a_result_list_need_the_dataset_that_names_them(saved: Callable[..., Path]) -> None:
    results = saved("results.json", [{"image_id": 7, "bbox": [-9, 0, 20, 5], "score": 0.5}])
    with pytest.raises(RequestError, match="result 1: image_id 7 is no file name; name the COCO dataset"):
        read_boxes(results)
    frame = read_boxes(results, images=saved("truth.json", dataset()))
    assert frame.row(0, named=True)["image_file"] == "a.jpg"
    assert frame["x0"][0] == -9  # what a detector guesses beyond the frame is kept, as COCO does


# -- bad input

BAD_TABLES = {
    "a,1,2,3,4\nb,5,2,3,4": "line 3 (b): box 5, 2, 3, 4: negative width",
    "a,1,5,3,4": "line 2 (a): box 1, 5, 3, 4: negative height",
    "a,1,2,1,4": "line 2 (a): box 1, 2, 1, 4 has no area",
    "a,1,2,3,4\nb,nan,2,3,4": "line 3 (b): x0 is nan, expected a number",
    "a,1,2,inf,4": "line 2 (a): x1 is inf, expected a number",
    "a,1,two,3,4": "line 2: y0 is 'two', expected a number",
    "a,1,,3,4": "line 2 (a): box 1, ?, 3, 4: a corner is missing",
    ",1,2,3,4": "line 2: no image_file",
}


@pytest.mark.parametrize(("lines", "said"), BAD_TABLES.items())
def test_a_bad_row_is_told_with_its_line(saved: Callable[..., Path], lines: str, said: str) -> None:
    path = saved("boxes.csv", f"image_file,x0,y0,x1,y1\n{lines}\n")
    with pytest.raises(DataError) as caught:
        read_boxes(path)
    assert str(caught.value) == f"{path}, {said}"


BAD_ROWS: list[tuple[list[dict[str, Any]], str]] = [
    ([row("a", -2, 0, 5, 5)], "row 1 (a): box -2, 0, 5, 5 leaves its picture"),
    ([row("a", 0, 0, 11.5, 5, width=10, height=9)], "leaves its picture of 10 x 9"),
    ([row("a", 0, 0, 5, 10.5, width=10, height=9)], "leaves its picture of 10 x 9"),
    ([row("a", 0, 0, 5, 5, width=0)], "width is 0, expected more than 0"),
    ([row("a", 0, 0, 5, 5, kind="on")], "kind is 'on'; did you mean 'one'? (known: many, none, one)"),
    ([row("a", 0, 0, 5, 5, kind="none")], "box 0, 0, 5, 5, but kind is none"),
    ([row("a", kind="one")], "kind is one, but there is no box"),
    ([row("a"), row("a", 0, 0, 5, 5)], "row 1 (a): a row without a box, and another row"),
    ([row("a"), row("a")], "row 1 (a): a row without a box, and another row"),
    (
        [row("a", 0, 0, 5, 5, number=1), row("b"), row("a", 0, 0, 6, 6, number=1)],
        "number 1 twice in this picture",
    ),
    ([row("a", 0, 0, 5, 5, width=9), row("a", 0, 0, 6, 6, width=8)], "width is 9, in another row of this"),
    ([row("a", 0, 0, 5, 5, area_px=-1)], "area_px is -1.0, expected 0 or more"),
    ([row("a", 0, 0, 5, 5, score=float("nan"))], "score is nan, expected a number"),
]


@pytest.mark.parametrize(("rows", "said"), BAD_ROWS)
def test_a_row_that_contradicts_itself_or_its_picture_is_refused(
    rows: list[dict[str, Any]], said: str
) -> None:
    with pytest.raises(DataError) as caught:
        table(rows)
    assert said in str(caught.value)


def test_a_box_may_leave_its_picture_by_a_pixel() -> None:
    rows = [row("a", -1, 0, 10.9, 5, width=10, height=9)]
    assert table(rows).select(XYXY).row(0) == (-1, 0, 10.9, 5)


BAD_COCO: list[tuple[Any, str]] = [
    ("[1", "not valid JSON"),
    ({"images": []}, "neither a COCO dataset (images, annotations) nor a list of results"),
    ({"annotations": []}, "it has no list of images"),
    ("3", "neither a COCO dataset"),
    (dataset([0, 0, 5, 5]) | {"images": []}, "annotation 1 (id 1): image_id is 7, and no image has this id"),
    (dataset([0, 0, 5, 5]) | {"images": [{"id": 7}]}, "image 1: no id, or no file_name"),
    (
        dataset() | {"images": [{"id": 7, "file_name": "a"}, {"id": 7, "file_name": "b"}]},
        "image 2: an earlier image has id 7",
    ),
    (
        dataset() | {"images": [{"id": 7, "file_name": "a"}, {"id": 8, "file_name": "/a"}]},
        "image 2: an earlier image has file_name a",
    ),
    (
        dataset() | {"annotations": [{"id": 3, "image_id": 7, "bbox": [0, 0, 5, 5]}] * 2},
        "annotation 2 (id 3): an earlier annotation has this id",
    ),
    (dataset([0, 0, 5]), "annotation 1 (id 1): bbox is [0, 0, 5], expected [x, y, width, height]"),
    (dataset([0, 0, 5, "5"]), 'bbox is [0, 0, 5, "5"], expected'),
    (dataset([0, 0, 5, float("nan")]), "bbox is [0, 0, 5, NaN], expected"),
    (dataset([9, 9, -5, 5]), "annotation 1 (id 1) (a.jpg): box 9, 9, 4, 14: negative width"),
    (dataset([9, 9, 5, 5], [1000, 5, 30, 30]), "annotation 2 (id 2) (a.jpg): box 1000, 5, 1030, 35 leaves"),
    (
        dataset([9, 9, 50, 50], [600, 50, 900, 700]),
        "annotation 2 (id 2): bbox looks like the corners x0, y0, x1, y1",
    ),
    (
        dataset() | {"annotations": [{"id": 1, "image_id": 7, "bbox": [0, 0, 5, 5], "iscrowd": 1}]},
        "annotation 1 (id 1): a crowd region",
    ),
    (
        dataset() | {"annotations": [{"image_id": 7, "bbox": [0, 0, 5, 5], "segmentation": "mask"}]},
        "annotation 1: segmentation holds neither polygons nor RLE",
    ),
    (dataset() | {"annotations": [5]}, "annotation 1: 5 is no object"),
    (
        dataset() | {"annotations": [{"image_id": 7, "bbox": [0, 0, 5, 5], "score": "high"}]},
        "annotation 1: score is 'high', expected a number",
    ),
]


@pytest.mark.parametrize(("content", "said"), BAD_COCO)
def test_a_bad_coco_file_is_refused_with_the_annotation(
    saved: Callable[..., Path], content: Any, said: str
) -> None:
    path = saved("boxes.json", content)
    with pytest.raises(DataError) as caught:
        read_boxes(path)
    assert str(caught.value).startswith(str(path))
    assert said in str(caught.value)


@settings(max_examples=80, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "images",
                        "annotations",
                        "id",
                        "image_id",
                        "bbox",
                        "file_name",
                        "segmentation",
                        "area",
                        "score",
                    ]
                ),
                inner,
                max_size=6,
            )
        ),
        max_leaves=25,
    )
)
def test_any_json_is_a_table_or_a_clear_error(tmp_path_factory: pytest.TempPathFactory, content: Any) -> None:
    path = tmp_path_factory.mktemp("any") / "boxes.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with contextlib.suppress(DataError, RequestError):
        assert list(read_boxes(path).columns) == list(SCHEMA)


def test_a_table_without_corners_or_of_an_unknown_form_is_refused(saved: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"no column 'x0'.*COCO's x, y, width, height belong in a \.json"):
        read_boxes(saved("boxes.csv", "image_file,x,y,w,h\na,1,2,3,4\n"))
    with pytest.raises(RequestError, match=r"unknown form of boxes '\.xml'"):
        read_boxes(saved("boxes.xml", ""))
    with pytest.raises(RequestError, match="no such file of boxes"):
        read_boxes("nowhere.csv")
    with pytest.raises(DataError, match="cannot be read as a table of boxes"):
        read_boxes(saved("boxes.parquet", "x"))
    with pytest.raises(RequestError, match="unknown form of boxes 'yolo'"):
        write_boxes(table([row("a")]), Path("boxes.csv"), form="yolo")


def test_writing_replaces_nothing_unless_told(tmp_path: Path) -> None:
    frame, path = table([row("a")]), tmp_path / "boxes.csv"
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(RequestError, match="exists"):
        write_boxes(frame, path)
    assert path.read_text(encoding="utf-8") == "mine"
    write_boxes(frame, path, overwrite=True)
    assert_frame_equal(read_boxes(path), frame)


# -- what is derived


def test_kind_and_rank_follow_from_the_boxes_where_they_are_not_told() -> None:
    frame = table(
        [
            row("a", 0, 0, 5, 5, score=0.2),
            row("b"),
            row("c", 0, 0, 5, 5),
            row("a", 1, 1, 5, 5, score=0.7),
            row("a", 2, 2, 5, 5, score=0.7),
            row("d", 0, 0, 0, 0),
        ]
    )
    assert frame.select("image_file", "kind", "number", "x0").rows() == [
        ("a", "many", 0, 1.0),
        ("a", "many", 1, 2.0),
        ("a", "many", 2, 0.0),
        ("b", "none", None, None),
        ("c", "one", 0, 0.0),
        ("d", "none", None, None),
    ]


def test_a_finding_and_its_rows_say_the_same() -> None:
    mask = np.zeros((30, 40), bool)
    mask[3:8, 2:12] = True
    boxes = np.array([[2.0, 3, 12, 8], [20, 20, 30, 28]])
    finding = Finding("many", boxes, np.array([0.9, 0.4]), mask, 11.2)
    rows = finding_rows(finding, image_file="a.jpg", part=4, width=40, height=30)
    frame = table(rows)
    assert frame.select("number", "score", "area_px", "length_px", "length_mm").rows() == [
        (0, 0.9, 50.0, 11.2, None),
        (1, 0.4, None, None, None),
    ]
    back = row_finding(frame.to_dicts())
    assert (back.kind, back.length_px) == ("many", 11.2)
    np.testing.assert_array_equal(back.boxes, boxes)
    np.testing.assert_array_equal(back.scores, finding.scores)
    nothing = Finding("none", np.empty((0, 4)), np.empty(0))
    rows = finding_rows(nothing, image_file="a.jpg", part=None, width=40, height=30)
    assert (len(rows), rows[0]["kind"], rows[0]["x0"]) == (1, "none", None)
    assert row_finding(rows).boxes.shape == (0, 4)


def test_pictures_are_found_by_name_part_and_bare_name() -> None:
    def listed(*rows: tuple[str, int | None]) -> pl.DataFrame:
        return pl.DataFrame(list(rows), {"image_file": pl.String, "part": pl.Int32}, orient="row")

    known = listed(("a.jpg", 1), ("a.jpg", 2), ("b.jpg", 1), ("train/c.jpg", None), (NFC, None))
    wanted = listed(("a.jpg", 2), ("b.jpg", 9), ("b.jpg", None), ("c.jpg", None), (NFD, None), ("z.jpg", 1))
    assert find_pictures(wanted[[0, 1, 3, 4, 5]], known).tolist() == [1, 2, 3, 4, -1]
    assert find_pictures(listed(("a.jpg", None)), known).tolist() == [-1]  # which of the two?
    with pytest.raises(DataError, match=r"two pictures of one name where the other table has one: b\.jpg"):
        find_pictures(wanted, known)
