import base64
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from bioscan.analysis.summary import Distribution, Summary, summarise
from bioscan.analysis.taxonomy import Taxonomy
from bioscan.app import figures
from bioscan.app.gallery import contact_sheet, thumbnail, thumbnail_data_uri
from bioscan.app.sunburst import sunburst_html
from bioscan.data.images import Images
from bioscan.jobs.summary import examples

Run = Callable[..., tuple[int, str, str]]


def plain(height: int, width: int, colour: tuple[int, int, int]) -> NDArray[np.uint8]:
    return np.full((height, width, 3), colour, np.uint8)


def long_tail(families: int = 60) -> pl.DataFrame:
    """A table with a long tail: family k of `families` has about 2,000 / k specimens."""
    rows = [
        ("Insecta", ("Diptera", "Coleoptera", "Odonata")[k % 3], f"Family{k:02}idae", f"BOLD:AAA{k:04}")
        for k in range(1, families + 1)
        for _ in range(2000 // k)
    ]
    frame = pl.DataFrame(rows, ["class", "order", "family", "uri"], orient="row").with_row_index("n")
    in_ten = pl.col("n") % 10
    role = (
        pl.when(in_ten < 7)
        .then(pl.lit("train"))
        .when(in_ten == 7)
        .then(pl.lit("validation"))
        .otherwise(pl.lit("test"))
    )
    return frame.select(
        pl.exclude("n"),
        pl.lit("ACGT" * 164 + "AC").alias("nucraw"),
        role.alias("large_insect_order"),
        role.alias("large_diptera_family"),
    )


@pytest.fixture(scope="module")
def summary() -> Summary:
    return summarise(long_tail())


# -- figures


def test_every_figure_is_a_png_with_something_on_it(summary: Summary, tmp_path: Path) -> None:
    made = figures.summary_figures(summary)
    assert set(made) == {
        *("ranks", "classes_order", "classes_family", "bins", "barcode_lengths", "experiments"),
        *("roles_large_insect_order", "roles_large_diptera_family"),
    }
    for stem, figure in made.items():
        figures.save(figure, tmp_path / f"{stem}.png")
        with Image.open(tmp_path / f"{stem}.png") as image:
            pixels = np.asarray(image.convert("RGB"))
        assert image.format == "PNG"
        assert min(pixels.shape[:2]) > 300
        drawn = (pixels != 255).any(axis=2)
        assert 0.01 < drawn.mean() < 0.9, stem
        # nothing is cut off at an edge: the outermost pixels are paper
        edge = np.concatenate([drawn[0], drawn[-1], drawn[:, 0], drawn[:, -1]])
        assert not edge.any(), stem


def test_equal_numbers_make_equal_files(summary: Summary, tmp_path: Path) -> None:
    for suffix in ("png", "svg"):
        for name in ("one", "two"):
            figure = figures.class_counts(summary.taxa_of("order"), "order")
            figures.save(figure, tmp_path / f"{name}.{suffix}")
        assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"two.{suffix}").read_bytes()


def test_the_bars_of_the_classes_have_their_counts_and_the_title_counts_the_rest(summary: Summary) -> None:
    taxa = summary.taxa_of("family")
    axes = figures.class_counts(taxa, "family").axes[0]
    assert axes.get_xscale() == "log"
    ends = [bar.get_x() + bar.get_width() for bar in axes.patches]  # type: ignore[attr-defined]
    counts = taxa["specimens"].to_list()
    assert ends == pytest.approx(counts[:40])
    assert [text.get_text() for text in axes.texts] == [f"{c:,}" for c in counts[:40]]
    assert [label.get_text() for label in axes.get_yticklabels()] == taxa["taxon"].to_list()[:40]
    title = axes.get_title(loc="left")
    # 2,000 specimens in the largest family, 2000 // 60 = 33 in the smallest: 60.6 : 1
    assert title.startswith("Specimens by family: 60 taxa, largest to smallest 61 : 1")
    assert f"the 40 largest; the other 20 have {sum(counts[40:]):,} specimens" in title


def test_homonyms_among_the_bars_are_told_apart_by_their_order() -> None:
    rows = [("Diptera", "Xidae", "Alpha"), ("Coleoptera", "Yidae", "Alpha"), ("Diptera", "Xidae", "Beta")]
    made = summarise(pl.DataFrame(rows, ["order", "family", "genus"], orient="row"))
    axes = figures.class_counts(made.taxa_of("genus"), "genus").axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["Alpha (Coleoptera)", "Alpha (Diptera)", "Beta"]


def test_the_dots_of_an_experiment_are_its_role_counts_and_zero_has_none() -> None:
    rows = [("a", "train")] * 5 + [("a", "validation")] * 2 + [("a", "test")] * 3 + [("b", "train")] * 4
    made = summarise(pl.DataFrame(rows, ["order", "large_insect_order"], orient="row"))
    classes = made.classes_of("large_insect_order")
    axes = figures.class_roles(classes, "large_insect_order").axes[0]
    dots = {c.get_label(): np.ma.getdata(c.get_offsets())[:, 0] for c in axes.collections[1:]}
    assert list(dots) == ["train (9)", "validation (2)", "test (3)"]
    np.testing.assert_array_equal(np.stack(list(dots.values())), [[5, 4], [2, np.nan], [3, np.nan]])


@pytest.mark.parametrize("sizes", [[1], [1, 1, 1], [3, 3], [1, 2, 5, 200_000]])
def test_bins_of_any_sizes_can_be_drawn(sizes: list[int], tmp_path: Path) -> None:
    figures.save(figures.bin_sizes(Distribution.of(np.array(sizes))), tmp_path / "bins.png")


def test_one_specimen_makes_figures_too(tmp_path: Path) -> None:
    made = summarise(long_tail().head(1))
    for stem, figure in figures.summary_figures(made).items():
        figures.save(figure, tmp_path / f"{stem}.png")
    assert (tmp_path / "classes_order.png").exists()


def test_a_table_without_rows_makes_no_figure() -> None:
    assert figures.summary_figures(summarise(long_tail().clear())) == {}


def test_the_colours_of_the_roles_differ_in_lightness_for_those_who_see_no_colour() -> None:
    grey = [
        0.2126 * int(c[1:3], 16) + 0.7152 * int(c[3:5], 16) + 0.0722 * int(c[5:], 16)
        for c in figures.ROLE_COLOURS.values()
    ]
    assert min(abs(a - b) for i, a in enumerate(grey) for b in grey[:i]) > 10


# -- contact sheet and thumbnails


@given(st.integers(1, 300), st.integers(1, 300), st.integers(8, 200))
@settings(max_examples=40, deadline=None)
def test_a_thumbnail_keeps_the_aspect_fits_the_size_and_is_never_enlarged(
    height: int, width: int, size: int
) -> None:
    with Image.open(io.BytesIO(thumbnail(plain(height, width, (10, 200, 30)), size))) as image:
        assert image.format == "JPEG"
        factor = min(1.0, size / max(height, width))
        assert image.size == (max(1, round(width * factor)), max(1, round(height * factor)))


def test_a_thumbnail_shows_the_picture() -> None:
    pixels = np.concatenate([plain(100, 100, (250, 10, 10)), plain(100, 100, (10, 10, 250))], axis=1)
    with Image.open(io.BytesIO(thumbnail(pixels, 50))) as image:
        assert image.size == (50, 25)
        red, blue = np.asarray(image)[12, 6].astype(int), np.asarray(image)[12, 44].astype(int)
    assert np.abs(red - [250, 10, 10]).max() < 12
    assert np.abs(blue - [10, 10, 250]).max() < 12


def test_a_data_uri_holds_the_thumbnail() -> None:
    pixels = plain(30, 40, (1, 2, 3))
    kind, _, content = thumbnail_data_uri(pixels, 20).partition(",")
    assert kind == "data:image/jpeg;base64"
    assert base64.b64decode(content) == thumbnail(pixels, 20)


def test_a_contact_sheet_has_the_pictures_in_reading_order_with_their_captions() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 200, 0), (0, 200, 200)]
    pictures = [(f"taxon {i}\n{i} specimens", plain(60, 90, c)) for i, c in enumerate(colours)]
    sheet = np.asarray(contact_sheet(pictures, columns=3, size=120, title="Examples"))
    places = []
    for colour in colours:
        rows, columns = np.nonzero((sheet == colour).all(axis=2))
        # fills the tile's width, aspect 3 : 2
        assert (columns.max() - columns.min() + 1, rows.max() - rows.min() + 1) == (120, 80)
        places.append((rows.min(), columns.min()))
    assert places == sorted(places)
    assert [left for _, left in places[:3]] == sorted({left for _, left in places})
    below = sheet[places[0][0] + 100 : places[0][0] + 160, places[0][1] : places[0][1] + 120]
    assert (below < 100).any()  # ink of the caption


def test_a_caption_too_long_for_its_tile_ends_in_an_ellipsis_and_stays_inside() -> None:
    pictures = [("W" * 200, plain(50, 50, (255, 0, 0))), ("short", plain(50, 50, (0, 0, 255)))]
    sheet = np.asarray(contact_sheet(pictures, columns=2, size=100))
    gap = sheet[:, 14 + 100 + 2 : 14 + 100 + 12]  # between the two tiles
    assert (gap == 255).all()


def test_a_sheet_of_nothing_is_an_empty_sheet() -> None:
    assert min(contact_sheet([]).size) > 0


# -- examples

TREES = {"b.jpg": "Diptera", "a.jpg": "Diptera", "c.jpg": "Coleoptera", "gone.jpg": "Odonata"}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Pictures a, b and c; a is cut short, and the picture of the only dragonfly is missing."""
    folder = tmp_path / "images"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (64, 80, 3), np.uint8)
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        Image.fromarray(noise).save(folder / name)
    (folder / "a.jpg").write_bytes((folder / "a.jpg").read_bytes()[:500])
    return folder


def test_an_example_is_the_first_readable_picture_by_name_whatever_the_order_of_rows_and_pictures(
    package: Path,
) -> None:
    frame = pl.DataFrame({"image_file": [*TREES, "z.jpg"], "order": [*TREES.values(), "Diptera"]})
    archive = package.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w") as file:
        file.write(package / "b.jpg", "z.jpg")
        for name in ("c.jpg", "b.jpg", "a.jpg"):
            file.write(package / name, name)
    for table, place in [(frame, package), (frame.reverse(), package), (frame, archive)]:
        found, failures = examples(table, Images(place), "order")
        names = {path: example.image_file for path, example in found.items()}
        assert names == {";;Diptera": "b.jpg", ";;Coleoptera": "c.jpg"}
        assert [f.name for f in failures] == ["a.jpg"]
        assert found[";;Diptera"].pixels.shape == (64, 80, 3)


def test_figures_on_the_command_line_and_a_picture_that_cannot_be_read(
    run_bioscan: Run, package: Path, tmp_path: Path
) -> None:
    rows = {"image_file": list(TREES), "order": list(TREES.values()), "family": ["Xidae"] * 4}
    pl.DataFrame(rows).write_csv(tmp_path / "my.tsv", separator="\t")
    folder = tmp_path / "figures"
    status, text, talk = run_bioscan("summary", tmp_path / "my.tsv", "--images", package, "--figures", folder)
    assert status == 1  # done, but a picture failed
    assert "1 example picture could not be read (first: a.jpg: truncated JPEG" in talk
    names = {p.name for p in folder.iterdir()}
    assert names == {
        *("ranks.png", "classes_order.png", "classes_family.png", "taxonomy.html"),
        *("examples_order.png", "examples_family.png"),
    }
    assert "examples_order.png" in text
    with Image.open(folder / "examples_order.png") as image:
        assert image.width > 360  # two tiles


def test_a_package_without_the_pictures_is_refused_and_leaves_nothing(
    run_bioscan: Run, package: Path, tmp_path: Path
) -> None:
    pl.DataFrame({"image_file": ["x.jpg"], "order": ["Diptera"]}).write_csv(
        tmp_path / "my.tsv", separator="\t"
    )
    status, _, talk = run_bioscan(
        "summary", tmp_path / "my.tsv", "--images", package, "--figures", tmp_path / "figures"
    )
    assert status == 2
    assert "has no readable picture that the metadata name" in talk
    assert not (tmp_path / "figures").exists()
    assert not list(tmp_path.glob(".figures*"))


# -- sunburst


def test_every_piece_of_the_sunburst_is_as_large_as_its_parts_and_what_is_left_out_is_said() -> None:
    tree = Taxonomy.build(long_tail(), ["order", "family"])
    for max_nodes in (5, 20, 1000):
        page = sunburst_html(tree, title="T", max_nodes=max_nodes)
        data = _sunburst_data(page)
        nodes = {
            i: (parent, value)
            for i, parent, value in zip(data["ids"], data["parents"], data["values"], strict=True)
        }
        below: dict[str, int] = {}
        for parent, value in nodes.values():
            below[parent] = below.get(parent, 0) + value
        assert below.pop("") == long_tail().height
        assert all(total == nodes[parent][1] for parent, total in below.items())  # every row has a family
        drawn = [i for i in nodes if not i.endswith("other")]
        assert len(drawn) - 1 == min(max_nodes, 63)  # 3 orders, 60 families
        hidden = sum(
            int(label.split()[0])
            for i, label in zip(data["ids"], data["labels"], strict=True)
            if i.endswith("other")
        )
        assert hidden == (63 - len(drawn) + 1 if max_nodes > 5 else 58)
        assert ("grey pieces hold the others" in page) == (max_nodes < 63)


def _sunburst_data(page: str) -> dict[str, Any]:
    """The trace as Plotly gets it, read out of the page."""
    start = page.index("[{", page.rindex("Plotly.newPlot("))
    trace, _ = json.JSONDecoder().raw_decode(page[start:])
    made: dict[str, Any] = trace[0]
    return made


def test_names_cannot_break_the_page() -> None:
    frame = pl.DataFrame({"order": ["<script>alert(1)</script>", "</div>&"]})
    page = sunburst_html(Taxonomy.build(frame, ["order"]), title="<b>T</b>")
    assert "<script>alert(1)" not in page
    assert "<b>T</b>" not in page


def test_the_sunburst_opens_in_a_browser_without_network_or_complaint(
    oracle: Callable[[str], str], tmp_path: Path
) -> None:
    program = oracle("chromium")
    from playwright.sync_api import sync_playwright

    page_file = tmp_path / "taxonomy.html"
    tree = Taxonomy.build(long_tail(), ["class", "order", "family"])
    page_file.write_text(sunburst_html(tree, title="Taxonomy of a test"), encoding="utf-8")
    flags = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    more = "--disable-component-update --disable-sync"
    requests: list[str] = []
    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=f"{flags} {more}".split())
        page = browser.new_page(viewport={"width": 1000, "height": 800}, offline=True)
        page.on("request", lambda r: requests.append(r.url))
        page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: complaints.append(str(e)))
        page.goto(page_file.as_uri())
        page.wait_for_selector("g.slice path.surface")
        assert page.title() == "Taxonomy of a test"
        assert page.locator("h1").inner_text() == "Taxonomy of a test"
        slices = page.locator("g.slice")
        assert slices.count() == 1 + 1 + 3 + 60
        box = page.locator("#chart").bounding_box()
        assert box is not None
        assert box["height"] > 500
        labels = page.locator("g.slicetext").all_text_contents()
        assert {"Insecta", "Diptera", "Coleoptera", "Odonata"} <= {*labels}
        name = page.locator("g.slicetext", has_text="Diptera").first.bounding_box()
        assert name is not None
        page.mouse.click(name["x"] + name["width"] / 2, name["y"] + name["height"] / 2)
        page.wait_for_function("document.querySelectorAll('g.slice').length < 60")
        browser.close()
    assert [r for r in requests if not r.startswith(("file:", "data:", "blob:"))] == []
    assert complaints == []
