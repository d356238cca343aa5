"""The report page, opened in a browser as a reader would."""

import csv
import html.parser
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pytest

from bioscan.app.report import read_run, write_report
from bioscan.data.predictions import PredictionsWriter
from bioscan.errors import DataError, RequestError

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

Bioscan = Callable[..., tuple[int, str, str]]
EXPERIMENT = "small_insect_order"
HOSTILE = "<script>document.title='taken'</script>"
ORDERS = ("Diptera", "Coleoptera", HOSTILE, 'A "quoted" & named', "Neuroptera", "Psocodea")
CHROMIUM = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with catalogue, package, run folder and predictions of a run that makes mistakes."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("finished")
    random = np.random.default_rng(2)
    num = 120
    targets = random.choice(len(ORDERS), num, p=[0.35, 0.25, 0.15, 0.1, 0.1, 0.05])
    logits = random.normal(0, 1, (num, len(ORDERS)))
    logits[np.arange(num), targets] += 1.2
    scores = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).astype(np.float32)
    scores[7] = np.nan
    keys = [f"BIOUG{i:05d}-A01" for i in range(num)]
    catalogue = pl.DataFrame(
        {
            "sampleid": keys,
            "image_file": [f"{key}.jpg" for key in keys],
            "order": [ORDERS[t] for t in targets],
            EXPERIMENT: random.choice(["train", "validation", "test"], num, p=[0.3, 0.2, 0.5]),
            "copyright_license": random.choice(["CC BY 3.0", HOSTILE], num),
        }
    ).with_columns(
        pl.when(pl.col("sampleid") == keys[7]).then(pl.lit("test")).otherwise(EXPERIMENT).alias(EXPERIMENT)
    )
    catalogue.write_csv(folder / "catalogue.csv")
    (folder / "photos").mkdir()
    for i in range(num):
        pixels = random.integers(0, 255, (40, 60, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{keys[i]}.jpg")
    best = np.nan_to_num(scores).argmax(axis=1)
    failed = pl.Series(np.isnan(scores[:, 0]))
    table = pl.DataFrame(
        {
            "sampleid": keys,
            "image_file": [f"{key}.jpg" for key in keys],
            "order": pl.Series([ORDERS[b] for b in best]).set(failed, None),
            "order_probability": pl.Series(scores.max(axis=1).astype(float)).set(failed, None),
            "assigned_rank": "order",
            "assigned_taxon": pl.Series([ORDERS[b] for b in best]).set(failed, None),
            "assigned_probability": None,
            "error": pl.Series(["truncated JPEG" if f else None for f in failed], dtype=pl.String),
        }
    )
    record = {"experiment": EXPERIMENT, "rank": "order", "model": "tiny", "model_sha256": "ab" * 32}
    leaves = [(None, None, order) for order in ORDERS]
    with PredictionsWriter(folder / "p.parquet", ranks=["order"], leaves=leaves, record=record) as writer:
        writer.write(table, scores)
    run = folder / "run"
    (run / "model").mkdir(parents=True)
    settings = {
        "epochs": 3,
        "normalise": True,
        "weights": None,
        "steps": [20, 25],
        "criterion": "macro_top_1",
    }
    told: dict[str, object] = {
        "settings": settings,
        "versions": {"bioscan": "0.1.0"},
        "split_hash": "cd" * 32,
    }
    told["left_out"] = {"no name at rank order": 7}
    (run / "record.json").write_text(json.dumps(told))
    (run / "model" / "model.json").write_text(json.dumps({"best_epoch": 2, "content_sha256": "ab" * 32}))
    header = ["epoch", "lr", "train_loss", "train_top_1", "validation_loss", "validation_micro_top_1"]
    with (run / "history.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [header, [1, 0.1, 2.2, 0.2, 2.1, ""], [2, 0.1, 1.5, 0.5, 1.4, 0.5], [3, 0.1, 1, 0.6, 1.6, 0.4]]
        )
    (run / "failed.csv").write_text("key,image_file,error\na,a.jpg,truncated\n")
    return folder


def arguments(folder: Path, output: Path, *more: object, **changes: Path) -> list[object]:
    flags = {"run": folder / "run", "images": folder / "photos"} | changes
    named = [part for name, value in flags.items() for part in (f"--{name}", value)]
    return ["report", folder / "p.parquet", folder / "catalogue.csv", "-o", output, *named, *more]


@pytest.fixture(scope="module")
def browser(oracle: Callable[[str], str]) -> "Iterator[Browser]":
    chromium = oracle("chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=chromium, args=CHROMIUM)


@pytest.fixture
def heard() -> list[str]:
    """Every request and complaint of the page."""
    return []


@pytest.fixture
def page(finished: Path, browser: "Browser", tmp_path: Path, heard: list[str]) -> "Iterator[Page]":
    """The report, opened in Chromium."""
    output = tmp_path / "report.html"
    sources = finished / "p.parquet", finished / "catalogue.csv"
    write_report(*sources, output, run=finished / "run", images=finished / "photos")
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.on("request", lambda r: heard.append(r.url) if not r.url.startswith("data:") else None)
    tab.on("console", lambda m: heard.append(m.text))
    tab.on("pageerror", lambda e: heard.append(str(e)))
    tab.goto(output.as_uri())
    yield tab
    tab.close()


def test_the_page_is_quiet_and_whole(page: "Page", heard: list[str]) -> None:
    """No request but for the page itself, no complaint, every photograph there, no name run as a program."""
    assert heard == [page.url]
    assert page.title() == f"tiny · {EXPERIMENT}"
    assert page.evaluate("document.scripts.length") == 1
    sizes = page.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.alt.length > 10])")
    assert len(sizes) >= 10
    assert all(done and width > 0 and alt for done, width, alt in sizes)
    assert HOSTILE in page.inner_text("#taxa")
    assert HOSTILE in page.inner_text("#errors")
    assert HOSTILE in page.inner_text("#data")
    assert HOSTILE in page.evaluate("document.querySelector('svg.matrix').textContent")


def test_the_page_can_be_read_by_ear_and_by_keyboard(page: "Page") -> None:
    assert page.evaluate("[...document.querySelectorAll('table')].every(t => t.caption?.textContent.trim())")
    assert page.evaluate("[...document.querySelectorAll('svg')].every(s => s.getAttribute('role') === 'img')")
    assert page.evaluate(
        "[...document.querySelectorAll('[aria-labelledby]')].every(e => "
        "e.getAttribute('aria-labelledby').split(' ').every(id => document.getElementById(id)?.textContent))"
    )
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    assert page.evaluate("[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.hash))")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the scores"
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_a_column_head_sorts_the_taxa(page: "Page") -> None:
    def column(place: int) -> Any:
        return page.evaluate(
            f"[...document.querySelectorAll('#taxa tbody tr')].map(r => r.children[{place}].dataset.value)"
        )

    supports = [int(v) for v in column(1)]
    assert supports == sorted(supports, reverse=True)
    page.get_by_role("button", name="recall").click()
    recalls = [float(v) for v in column(2) if v]
    assert recalls == sorted(recalls, reverse=True)
    page.get_by_role("button", name="recall").click()
    assert [float(v) for v in column(2) if v] == sorted(recalls)
    assert page.get_attribute("#taxa th[aria-sort]", "aria-sort") == "ascending"


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_never_scrolls_sideways(page: "Page", width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(page: "Page", scheme: Any) -> None:
    """WCAG 2: a contrast of at least 4.5 for the colours that text is set in."""
    page.emulate_media(color_scheme=scheme)
    colours = page.evaluate(
        "Object.fromEntries(['paper','card','ink','soft','leaf','rust'].map(n => "
        "[n, getComputedStyle(document.documentElement).getPropertyValue('--' + n).trim()]))"
    )
    for ground in ("paper", "card"):
        for text in ("ink", "soft", "leaf", "rust"):
            assert contrast(colours[ground], colours[text]) >= 4.5, (scheme, ground, text)


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


# -- without a browser


class Reader(html.parser.HTMLParser):
    """Collects the text, and whatever might lead elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.links: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "action")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader


def test_nothing_on_the_page_leads_elsewhere_and_the_same_run_gives_the_same_bytes(
    finished: Path, tmp_path: Path, run_bioscan: Bioscan
) -> None:
    for name in ("one", "two"):
        status, text, talk = run_bioscan(*arguments(finished, tmp_path / f"{name}.html"))
        assert (status, talk) == (0, "")
        assert text.endswith(f"specimens; report: {tmp_path / name}.html\n")
    found = read(tmp_path / "one.html")
    assert found.scripts == 1
    assert {link[:5] for link in found.links if not link.startswith("#")} == {"data:"}
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_the_record_the_failures_and_the_licences_are_told(
    finished: Path, tmp_path: Path, run_bioscan: Bioscan
) -> None:
    run_bioscan(*arguments(finished, tmp_path / "r.html", "--title", "Mine & yours"))
    text = " ".join(" ".join(read(tmp_path / "r.html").text).split())
    for expected in (
        "Mine & yours",
        "Epoch 2 of 3 was kept, the best on validation by macro_top_1",
        "1 without an answer because the image failed: counted as errors",
        "1 training or validation images could not be read",
        "Training and validation: 7 specimens left out, no name at rank order",
        "cd" * 32,
        "bioscan 0.1.0",
        "CC BY 3.0",
        "steps 20 25",
        "normalise true",
        "weights none",
        "Not computable: top_10",
    ):
        assert expected in text
    assert "Artificial data" not in text


def test_artificial_data_are_called_so(finished: Path, tmp_path: Path, run_bioscan: Bioscan) -> None:
    frame = pl.read_csv(finished / "catalogue.csv")
    frame.with_columns(copyright_license=pl.lit("CC0 (artificial data)")).write_csv(tmp_path / "c.csv")
    run_bioscan("report", finished / "p.parquet", tmp_path / "c.csv", "-o", tmp_path / "r.html")
    assert "Artificial data." in read(tmp_path / "r.html").text


def test_another_tools_csv_makes_a_page_without_curves_and_pictures(
    tmp_path: Path, run_bioscan: Bioscan
) -> None:
    (tmp_path / "p.csv").write_text("sampleid,order\na,Diptera\nb,Coleoptera\n")
    (tmp_path / "c.csv").write_text("sampleid,order\na,Diptera\nb,Diptera\n")
    status, _, talk = run_bioscan("report", tmp_path / "p.csv", tmp_path / "c.csv", "-o", tmp_path / "r.html")
    assert (status, talk) == (0, "")
    text = " ".join(read(tmp_path / "r.html").text)
    assert "The predictions carry no record" in text
    assert "The metadata states no licence." in text


def test_a_photograph_that_cannot_be_read_is_said_on_the_page_and_by_the_exit_status(
    finished: Path, tmp_path: Path, run_bioscan: Bioscan
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for source in (finished / "photos").iterdir():
        (photos / source.name).write_bytes(source.read_bytes()[:300])
    status, _, talk = run_bioscan(*arguments(finished, tmp_path / "r.html", images=photos))
    assert status == 1
    assert "photographs of errors could not be read (first: BIOUG" in talk
    assert "truncated" in (tmp_path / "r.html").read_text()


def test_a_run_that_did_not_make_the_predictions_is_refused(
    finished: Path, tmp_path: Path, run_bioscan: Bioscan
) -> None:
    other = tmp_path / "other"
    (other / "model").mkdir(parents=True)
    (other / "model" / "model.json").write_text(json.dumps({"content_sha256": "ef" * 32}))
    status, _, talk = run_bioscan(*arguments(finished, tmp_path / "r.html", run=other))
    assert status == 2
    assert "did not make these predictions" in talk
    assert not (tmp_path / "r.html").exists()


def test_a_page_that_exists_stays_unless_told(finished: Path, tmp_path: Path, run_bioscan: Bioscan) -> None:
    output = tmp_path / "r.html"
    output.write_text("mine")
    assert run_bioscan(*arguments(finished, output))[0] == 2
    assert output.read_text() == "mine"
    assert run_bioscan(*arguments(finished, output, "--overwrite"))[0] == 0


def test_a_folder_that_is_no_run_and_a_broken_record_are_one_message(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no run folder"):
        read_run(tmp_path)
    (tmp_path / "record.json").write_text("{")
    with pytest.raises(DataError, match=r"record\.json: cannot be read"):
        read_run(tmp_path)
    (tmp_path / "record.json").write_text("{}")
    (tmp_path / "history.csv").write_text("epoch,train_loss\n1,high\n")
    with pytest.raises(DataError, match=r"history\.csv: cannot be read"):
        read_run(tmp_path)
