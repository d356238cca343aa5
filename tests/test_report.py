"""The report page, opened in a browser as a reader would."""

import csv
import html.parser
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pytest

from bioscan.app.report import read_run, write_report
from bioscan.data.predictions import PredictionsWriter
from bioscan.errors import DataError, RequestError
from bioscan.jobs.evaluate import evaluate_ranks
from bioscan.jobs.evaluate_hierarchy import evaluate_hierarchy

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
            "[...document.querySelectorAll('#taxa table.sortable tbody tr')]"
            f".map(r => r.children[{place}].dataset.value)"
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
        "Object.fromEntries(['paper','card','ink','soft','leaf','rust','good','fair','bad','grid'].map(n => "
        "[n, getComputedStyle(document.documentElement).getPropertyValue('--' + n).trim()]))"
    )
    for ground in ("paper", "card"):
        for text in ("ink", "soft", "leaf", "rust"):
            assert contrast(colours[ground], colours[text]) >= 4.5, (scheme, ground, text)
    for ground in ("good", "fair", "bad", "grid"):  # names in the sunburst
        assert contrast(colours[ground], colours["ink"]) >= 4.5, (scheme, ground)


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


# -- several ranks

SPECIES = {
    "Aus bus": ("Diptera", "Aidae"),
    "Aus cus": ("Diptera", "Aidae"),
    "Dus eus": ("Diptera", "Didae"),
    "Gus hus": ("Coleoptera", "Gidae"),
}


@pytest.fixture(scope="module")
def hierarchical(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with catalogue and predictions of a model of three ranks that stops where it is unsure."""
    folder = tmp_path_factory.mktemp("hierarchical")
    random = np.random.default_rng(5)
    num, names = 400, list(SPECIES)
    targets = random.choice(4, num, p=[0.5, 0.3, 0.15, 0.05])
    logits = random.normal(0, 1, (num, 4))
    logits[np.arange(num), targets] += 1.5
    scores = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).astype(np.float32)
    keys = [f"s{i}" for i in range(num)]
    lineages = [
        (None, None, order, family, None, None, None, name) for name, (order, family) in SPECIES.items()
    ]
    columns: dict[str, object] = {"sampleid": keys, "image_file": [f"{key}.jpg" for key in keys]}
    truth: dict[str, object] = dict(columns)
    best = scores.argmax(axis=1)
    for place, rank in ((2, "order"), (3, "family"), (7, "species")):
        label = np.array([lineage[place] for lineage in lineages])
        truth[rank] = label[targets]
        columns[rank] = label[best]
        same = label[None, :] == label[best][:, None]
        columns[f"{rank}_probability"] = (scores * same).sum(axis=1).clip(0, 1).astype(float)
    hidden = random.random(num) < 0.3  # no name at rank species in the catalogue
    roles = random.choice(["train", "validation", "test"], num, p=[0.3, 0.3, 0.4])
    catalogue = pl.DataFrame(truth | {EXPERIMENT: roles}).with_columns(
        species=pl.when(pl.Series(hidden)).then(None).otherwise("species")
    )
    catalogue.write_csv(folder / "catalogue.csv")
    table = pl.DataFrame(columns).with_columns(error=pl.lit(None, pl.String))
    sure = pl.col("species_probability") >= 0.6
    table = table.with_columns(
        assigned_rank=pl.when(sure).then(pl.lit("species")).otherwise(pl.lit("order")),
        assigned_taxon=pl.when(sure).then("species").otherwise("order"),
        assigned_probability=pl.when(sure).then("species_probability").otherwise("order_probability"),
    )
    record = {"experiment": EXPERIMENT, "ranks": ["order", "family", "species"], "max_error": 0.25}
    ranks = ["order", "family", "species"]
    with PredictionsWriter(folder / "p.parquet", ranks=ranks, leaves=lineages, record=record) as writer:
        writer.write(table, scores)
    assert len(names) == scores.shape[1]
    return folder


def test_the_ranks_the_paths_and_where_answers_stop_are_told_with_the_numbers_of_the_evaluation(
    hierarchical: Path, tmp_path: Path
) -> None:
    sources = hierarchical / "p.parquet", hierarchical / "catalogue.csv"
    write_report(*sources, tmp_path / "r.html")
    text = " ".join(" ".join(read(tmp_path / "r.html").text).split())
    by_rank, paths = evaluate_ranks(*sources), evaluate_hierarchy(*sources)
    for rank, found in by_rank.items():
        micro = found.metrics["top_1"]["micro"]
        shown = f"{rank} {found.n} {found.metrics['top_1']['macro'].classes} {100 * micro.value:.1f} "
        assert f"{shown}{100 * micro.low:.1f}–{100 * micro.high:.1f}" in text
    for name in ("hierarchical_precision", "tree_distance", "mistake_severity"):
        assert f"{name.replace('_', ' ')} {paths.metrics[name].value:.4f}" in text
        assert f"{paths.assigned_metrics[name].value:.4f}" in text
    row = paths.assigned.filter(pl.col("rank") == "species").to_dicts()[0]
    assert (
        f"species {row['labelled']} {row['named']} {100 * row['coverage']:.1f} {row['wrong']} "
        f"{100 * row['error_over_all']:.1f} " in text
    )
    assert "wrong for at most 25.0 % of all specimens" in text
    assert "Calibrated on" in text
    assert text.count("of all get a wrong one, which is") == 1


def test_errors_are_shown_by_confidence_and_by_how_far_they_are_from_the_truth(
    hierarchical: Path, tmp_path: Path
) -> None:
    sources = hierarchical / "p.parquet", hierarchical / "catalogue.csv"
    write_report(*sources, tmp_path / "r.html")
    text = " ".join(" ".join(read(tmp_path / "r.html").text).split())
    sure, far = text.split("probability first.")[1].split("The furthest from the truth")
    given = [float(share) for share in re.findall(r" at (\d+\.\d) %", sure)]
    assert len(given) == 18
    assert given == sorted(given, reverse=True)
    told = re.findall(r"instead of (\w+) \w+, (\d) steps away", far)
    assert len(told) == 12
    # wrong from the order down comes before wrong from the species down, a longer way before a shorter one
    places = [(("order", "family", "species").index(rank), -int(steps)) for rank, steps in told]
    assert places == sorted(places)
    assert places[0] == (0, -6)  # three names up, three down


def test_the_page_of_several_ranks_holds_in_a_browser(
    hierarchical: Path, browser: "Browser", tmp_path: Path, heard: list[str]
) -> None:
    """Quiet, no wider than a phone, and every piece of the sunburst drawn and told."""
    output = tmp_path / "r.html"
    write_report(hierarchical / "p.parquet", hierarchical / "catalogue.csv", output)
    tab = browser.new_page(viewport={"width": 390, "height": 800})
    tab.on("request", lambda r: heard.append(r.url))
    tab.on("console", lambda m: heard.append(m.text))
    tab.on("pageerror", lambda e: heard.append(str(e)))
    tab.goto(output.as_uri())
    assert [line for line in heard if not line.startswith("data:")] == [tab.url]
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    pieces = tab.evaluate(
        "[...document.querySelectorAll('.sunburst g')].map(g => [g.querySelector('title').textContent,"
        " g.querySelector('path').getTotalLength(), getComputedStyle(g.querySelector('path')).fill])"
    )
    assert len(pieces) == 2 + 3 + 4  # orders, families, species
    assert all("named right" in told and length > 10 for told, length, _ in pieces)
    assert all(fill not in ("none", "rgb(0, 0, 0)") for *_, fill in pieces)
    inside = tab.evaluate(
        "(() => { const box = document.querySelector('.sunburst').getBoundingClientRect();"
        " return [...document.querySelectorAll('.sunburst g path')].every(p => {"
        " const b = p.getBoundingClientRect(); return b.left >= box.left - 1 && b.right <= box.right + 1"
        " && b.top >= box.top - 1 && b.bottom <= box.bottom + 1; }); })()"
    )
    assert inside
    assert tab.evaluate("[...document.querySelectorAll('.believe li')].length") == 3
    tab.close()


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


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        (["Diptera", "Diptera"], "No specimen got a wrong name."),
        (["Coleoptera", "Coleoptera"], "0 % got the right name"),
        (["Diptera", ""], "without a predicted name at the rank: counted as errors"),
        (["", ""], "2 without a predicted name at the rank: counted as errors"),
    ],
)
@pytest.mark.parametrize("probability", [None, 0.9, 1.0])
def test_one_taxon_no_errors_only_errors_and_no_answer_make_whole_pages(
    tmp_path: Path, named: list[str], expected: str, probability: float | None
) -> None:
    table = pl.DataFrame({"sampleid": ["a", "b"], "order": named})
    if probability is not None:
        table = table.with_columns(order_probability=pl.lit(probability))
    table.write_csv(tmp_path / "p.csv")
    (tmp_path / "c.csv").write_text("sampleid,order\na,Diptera\nb,Diptera\n")
    write_report(tmp_path / "p.csv", tmp_path / "c.csv", tmp_path / "r.html")
    text = " ".join(" ".join(read(tmp_path / "r.html").text).split())
    assert expected in text
    assert "Only 2 specimens were checked" in text
    assert ("came without probabilities" in text) == (probability is None or not any(named))
    for missing in ("nan", "None", "inf "):
        assert f" {missing}" not in text.split("Data and licence")[1]
        assert f" {missing} " not in text


def test_labels_above_the_ranks_of_the_model_make_a_page_of_their_rank(
    hierarchical: Path, tmp_path: Path
) -> None:
    """Somebody who knows orders only can check a model of families and species."""
    catalogue = pl.read_csv(hierarchical / "catalogue.csv").drop("family", "species")
    catalogue.write_csv(tmp_path / "c.csv")
    table = pl.read_parquet(hierarchical / "p.parquet")
    record = {"experiment": EXPERIMENT, "ranks": ["family", "species"]}
    ranks = ["order", "family", "species"]
    with PredictionsWriter(tmp_path / "p.parquet", ranks=ranks, leaves=None, record=record) as writer:
        writer.write(table)
    write_report(tmp_path / "p.parquet", tmp_path / "c.csv", tmp_path / "r.html", rank="order")
    text = " ".join(read(tmp_path / "r.html").text)
    assert "got the right name at rank order" in text
    assert "Rank by rank" not in text


def test_a_model_calibrated_anew_still_made_the_predictions(tmp_path: Path) -> None:
    """Its record and so its hash have changed; its weights have not."""
    (tmp_path / "c.csv").write_text("sampleid,order\na,Diptera\nb,Coleoptera\n")
    table = pl.DataFrame({"sampleid": ["a", "b"], "image_file": None, "order": ["Diptera", "Diptera"]})
    table = table.with_columns(
        order_probability=pl.lit(0.5),
        assigned_rank=pl.lit("order"),
        assigned_taxon=pl.col("order"),
        assigned_probability=pl.lit(0.5),
        error=pl.lit(None, pl.String),
    )
    record = {"model_sha256": "ab" * 32, "weights_sha256": "cd" * 32}
    with PredictionsWriter(tmp_path / "p.parquet", ranks=["order"], leaves=None, record=record) as writer:
        writer.write(table)
    for weights, refused in (("cd" * 32, False), ("ef" * 32, True)):
        info = {"content_sha256": "00" * 32, "weights_sha256": weights}
        (tmp_path / "model.json").write_text(json.dumps(info))
        sources = tmp_path / "p.parquet", tmp_path / "c.csv", tmp_path / f"{weights[:2]}.html"
        if refused:
            with pytest.raises(RequestError, match="did not make these predictions"):
                write_report(*sources, run=tmp_path)
        else:
            write_report(*sources, run=tmp_path)


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
