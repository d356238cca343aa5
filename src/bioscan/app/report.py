"""One self-contained HTML page of a run: its record, curves, scores, errors, data and licences.

The page asks the network for nothing, and no name in it is ever read as HTML. Charts are SVG in the page's
own colours, light and dark.
"""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import polars as pl

from bioscan.analysis.splits import role_counts
from bioscan.app import scores
from bioscan.app.output import cell
from bioscan.data.decode import read_rgb
from bioscan.data.images import Images
from bioscan.data.metadata import fingerprint, read_metadata, scan_metadata
from bioscan.errors import DataError, ImageError, RequestError, require
from bioscan.files import refuse_existing, writing
from bioscan.jobs.evaluate import KS, Evaluation, evaluate
from bioscan.vocabulary import ROLES

WORST: Final = 18
"""Worst errors shown."""
THUMBNAIL: Final = 224
"""Longer side of a picture in the page, pixels."""
DRAWN: Final = 40
"""A confusion matrix of more taxa than this is not drawn; the common confusions are listed anyway."""
LISTED: Final = 200
"""Taxa in the table, the most populous ones."""
CONFUSIONS: Final = 15
NO_ANSWER: Final = "no answer"

LICENCE_COLUMNS: Final = {
    "copyright_license": "Licence",
    "copyright_holder": "Rights holder",
    "copyright_institution": "Institution",
    "photographer": "Photographer",
    "author": "Author",
}


@dataclass(frozen=True)
class Run:
    """What a run or model folder says of a training."""

    record: dict[str, Any]
    """Settings, versions, seed, fingerprints."""
    history: list[dict[str, float | None]]
    """A dict per epoch."""
    best_epoch: int | None
    content_sha256: str | None
    failed: int
    """Training and validation images that could not be read."""


@dataclass(frozen=True)
class Picture:
    """A wrong answer, and its photograph if there is one."""

    key: str
    taxon: str
    named: str
    probability: float | None
    source: str | None
    """A `data:` address."""
    reason: str | None
    """Why there is no picture."""


def write_report(
    predictions: Path | str,
    catalogue: Path | str,
    output: Path | str,
    *,
    run: Path | str | None = None,
    images: Path | str | None = None,
    title: str | None = None,
    rank: str | None = None,
    experiment: str | None = None,
    role: str | None = None,
    within: str | None = None,
    ks: Sequence[int] = KS,
    seed: int = 1,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Evaluate predictions and write the page.

    Args:
        predictions: A predictions table.
        catalogue: A catalogue or TSV.
        output: The page, `.html`.
        run: Run folder, or a model folder, for the record and the curves.
        images: Package of the images, for the worst errors.
        title: Heading; None: from the model and the experiment.
        rank: As the next ones in `jobs.evaluate.evaluate`.
        experiment: Split column.
        role: Whose specimens count.
        within: Only below this taxon.
        ks: k of top-k and average-k.
        seed: Of the bootstrap.
        overwrite: Replace the page.

    Returns:
        `report` (path), `specimens`, `pictures` shown, `failed` (pictures that could not be read).

    Raises:
        RequestError, DataError: as evaluate; a run folder that is none, or of another model.
        MissingExtraError: jinja2 is not installed.
    """
    output = Path(output)
    require("jinja2", "report")
    refuse_existing(output, overwrite=overwrite)
    of_run = read_run(run) if run else None
    package = Images(images) if images else None
    found = evaluate(
        predictions,
        catalogue,
        rank=rank,
        experiment=experiment,
        role=role,
        within=within,
        ks=ks,
        seed=seed,
    )
    made_by = found.record.get("model_sha256")
    if of_run and made_by and of_run.content_sha256 not in (None, made_by):
        raise RequestError(f"the model in {run} did not make these predictions; name the run that did")
    frame = _catalogue(catalogue, found)
    pictures = _pictures(found, frame, package)
    page = render(
        found,
        run=of_run,
        data=_data(found, frame, fingerprint(catalogue), Path(catalogue).name),
        pictures=pictures,
        has_package=package is not None,
        title=title,
    )
    with writing(output, overwrite=overwrite) as partial:
        partial.write_text(page, encoding="utf-8")
    failed = [{"key": p.key, "error": p.reason} for p in pictures if p.reason]
    shown = sum(p.source is not None for p in pictures)
    return {"report": str(output), "specimens": found.n, "pictures": shown, "failed": failed}


def read_run(folder: Path | str) -> Run:
    """The record and the history in a run folder, or in a model folder.

    Raises:
        RequestError: neither is there.
        DataError: a file that cannot be read.
    """
    folder = Path(folder)
    model = folder / "model" if (folder / "model").is_dir() else folder
    if not (model / "model.json").is_file() and not (folder / "record.json").is_file():
        raise RequestError(f"{folder}: no run folder, it holds neither record.json nor model/model.json")
    info, record = _json(model / "model.json"), _json(folder / "record.json")
    place = next((f for f in (folder / "history.csv", model / "history.csv") if f.is_file()), None)
    failed = folder / "failed.csv"
    return Run(
        record={k: v for k, v in (record or info).items() if k != "taxonomy"},
        history=_history(place) if place else [],
        best_epoch=info.get("best_epoch"),
        content_sha256=info.get("content_sha256"),
        failed=max(0, len(_lines(failed)) - 1) if failed.is_file() else 0,
    )


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    return content


def _lines(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def _history(path: Path) -> list[dict[str, float | None]]:
    header, *rows = _lines(path) or [[]]
    try:
        return [
            {name: float(value) if value else None for name, value in zip(header, row, strict=True)}
            for row in rows
        ]
    except ValueError as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


# -- data


def _catalogue(catalogue: Path | str, found: Evaluation) -> pl.DataFrame:
    known = scan_metadata(catalogue).collect_schema().names()
    wanted = {found.key, "image_file", "chunk_number", found.rank, found.experiment, *LICENCE_COLUMNS}
    return read_metadata(catalogue, [c for c in known if c in wanted])


def _data(found: Evaluation, frame: pl.DataFrame, sha256: str, name: str) -> dict[str, Any]:
    """Where specimens and photographs come from."""
    used = frame
    counts = pl.DataFrame(schema={"taxon": pl.String, **dict.fromkeys(ROLES, pl.Int64)})
    if found.experiment:
        used = frame.filter(pl.col(found.experiment).is_in(ROLES))
        counts = role_counts(frame[found.rank], frame[found.experiment])
    origins = {
        title: used[column].fill_null("not stated").value_counts(sort=True).rows()
        for column, title in LICENCE_COLUMNS.items()
        if column in used.columns
        and (column == "copyright_license" or used[column].null_count() < used.height)
    }
    told = " ".join(str(value) for rows in origins.values() for value, _ in rows).lower()
    return {
        "name": name,
        "rows": frame.height,
        "used": used.height,
        "sha256": sha256,
        "origins": origins,
        "artificial": "artificial" in told or "synthetic" in told,
        "roles": {row["taxon"]: row for row in counts.to_dicts()},
        "role_totals": {role: int(counts[role].sum()) for role in ROLES},
        "has_roles": found.experiment is not None,
    }


def _pictures(found: Evaluation, frame: pl.DataFrame, package: Images | None) -> list[Picture]:
    """The most confident wrong answers first; specimens without an answer are no such errors."""
    wrong = found.errors().filter(pl.col("named").is_not_null()).head(WORST)
    rows = wrong.join(frame, on=found.key, how="left", maintain_order="left", suffix=" of catalogue")
    if package is None or "image_file" not in rows.columns:
        sources: list[tuple[str | None, str | None]] = [(None, None)] * rows.height
    else:
        parts = rows["chunk_number"] if "chunk_number" in rows.columns else None
        sources = [_thumbnail(package, int(at)) for at in package.find(rows["image_file"], parts)]
    return [
        Picture(row[found.key], row["taxon"], row["named"], row["probability"], source, reason)
        for row, (source, reason) in zip(rows.to_dicts(), sources, strict=True)
    ]


def _thumbnail(package: Images, row: int) -> tuple[str | None, str | None]:
    from bioscan.app.gallery import thumbnail_data_uri

    if row < 0:
        return None, "not in the package"
    try:
        return thumbnail_data_uri(read_rgb(package, row, min_size=THUMBNAIL), THUMBNAIL), None
    except ImageError as error:
        return None, error.reason


# -- the page


def render(
    found: Evaluation,
    *,
    run: Run | None,
    data: Mapping[str, Any],
    pictures: Sequence[Picture],
    has_package: bool,
    title: str | None = None,
) -> str:
    """The page as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("bioscan.app", "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cell": cell, "percent": _percent, "setting": _setting}
    record = run.record if run else found.record
    model = found.record.get("model") or record.get("backbone")
    heading = title or " · ".join(filter(None, (model or "Predictions", found.experiment, found.within)))
    metric_rows, metric_header = scores.metric_rows(found)
    return environment.get_template("report.html").render(
        title=heading,
        model=model,
        found=found,
        caption=scores.caption(found),
        counted=scores.counted(found),
        without=scores.without(found),
        notes=scores.notes(found),
        headline=_headline(found),
        metric_rows=metric_rows,
        metric_header=metric_header,
        small=found.per_class.filter(pl.col("support").is_between(1, 4)).height,
        classes=found.per_class.head(LISTED).to_dicts(),
        num_classes=found.per_class.height,
        matrix=_matrix(found),
        confusions=_confusions(found),
        curves=_curves(run) if run and run.history else [],
        pictures=pictures,
        has_package=has_package,
        run=run,
        record=record,
        settings=list((record.get("settings") or {}).items()),
        data=data,
    )


def _percent(value: float | None) -> str:
    if value is None:
        return "–"
    return "<0.1 %" if 0 < value < 0.0005 else f"{100 * value:.1f} %"


def _setting(value: Any) -> str:
    """A setting as one would type it."""
    if isinstance(value, list):
        return " ".join(map(_setting, value))
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


HEADLINE: Final = (
    ("top_1", "macro", "Top-1, macro", "mean over taxa"),
    ("top_1", "micro", "Top-1, micro", "share of specimens"),
    ("f1", "macro", "F1, macro", "mean over taxa"),
    ("top_3", "macro", "Top-3, macro", "mean over taxa"),
)


def _headline(found: Evaluation) -> list[dict[str, Any]]:
    return [
        {"name": name, "what": what, "score": found.metrics[metric][average]}
        for metric, average, name, what in HEADLINE
        if metric in found.metrics
    ]


def _matrix(found: Evaluation) -> dict[str, Any] | None:
    """Shares of each taxon's specimens by answer, for a drawing; None where there are too many taxa."""
    there = found.per_class.filter((pl.col("support") > 0) | (pl.col("predicted") > 0))
    rows = there.filter(pl.col("support") > 0)["taxon"].to_list()
    columns = there["taxon"].to_list()
    if len(columns) > DRAWN:
        return None
    if found.confusion["named"].has_nulls():
        columns.append(NO_ANSWER)
    support = dict(found.per_class.select("taxon", "support").iter_rows())
    cells = [
        {
            "row": rows.index(taxon),
            "column": columns.index(named),
            "taxon": taxon,
            "named": named,
            "count": count,
            "share": count / support[taxon],
        }
        for taxon, named, count in found.confusion.with_columns(
            pl.col("named").fill_null(NO_ANSWER)
        ).iter_rows()
    ]
    size = max(16, min(56, 640 // len(columns)))
    longest = max(map(len, (*rows, *columns)))
    return {
        "rows": [(taxon, support[taxon]) for taxon in rows],
        "columns": columns,
        "cells": cells,
        "size": size,
        "labels": size >= 30,
        "left": 7.2 * min(longest, 28) + 62,
        "top": 6.4 * min(longest, 28) + 24,
        "beyond": 3.4 * min(longest, 28),  # where slanted names end, to the right of their column
    }


def _confusions(found: Evaluation) -> list[dict[str, Any]]:
    support = found.per_class.select("taxon", "support")
    wrong = found.confusion.filter(pl.col("named").ne_missing(pl.col("taxon")))
    shares = wrong.join(support, on="taxon", maintain_order="left").with_columns(
        pl.col("named").fill_null(NO_ANSWER), share=pl.col("specimens") / pl.col("support")
    )
    return shares.sort("specimens", descending=True, maintain_order=True).head(CONFUSIONS).to_dicts()


# -- training curves

WIDTH: Final = 440
HEIGHT: Final = 250
LEFT, RIGHT, TOP, BOTTOM = 38, 118, 14, 38

PANELS: Final = {
    "Loss": {"train_loss": "training", "validation_loss": "validation"},
    "Top-1": {
        "train_top_1": "training",
        "validation_micro_top_1": "validation, micro",
        "validation_macro_top_1": "validation, macro",
    },
}
"""Title -> column of the history -> label of its line."""


def _curves(run: Run) -> list[dict[str, Any]]:
    """Lines, ticks and labels of each panel, in its own pixels."""
    epochs = [int(row["epoch"] or 0) for row in run.history]
    return [
        _panel(title, {label: [row.get(c) for row in run.history] for c, label in lines.items()}, epochs, run)
        for title, lines in PANELS.items()
    ]


def _panel(
    title: str, lines: Mapping[str, Sequence[float | None]], epochs: Sequence[int], run: Run
) -> dict[str, Any]:
    values = [v for line in lines.values() for v in line if v is not None]
    y_ticks = [0, 0.25, 0.5, 0.75, 1.0] if title != "Loss" else _ticks(max(values, default=1.0))
    first, last = epochs[0], max(epochs[-1], epochs[0] + 1)

    def x(epoch: float) -> float:
        return round(LEFT + (epoch - first) / (last - first) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - value / y_ticks[-1] * (HEIGHT - TOP - BOTTOM), 1)

    drawn: list[dict[str, Any]] = []
    for number, (label, known) in enumerate(lines.items(), start=1):
        points = [(x(e), y(v)) for e, v in zip(epochs, known, strict=True) if v is not None]
        if points:
            final = next(v for v in reversed(known) if v is not None)
            drawn.append(
                {"number": number, "label": label, "points": points, "final": final, "at": points[-1][1]}
            )
    drawn.sort(key=lambda line: line["at"])
    for line, place in zip(drawn, _apart(line["at"] for line in drawn), strict=True):
        line["at"] = place
    step = max(1, round((last - first) / 6))
    return {
        "title": title,
        "lines": drawn,
        "y_ticks": [(y(tick), f"{tick:g}") for tick in y_ticks],
        "x_ticks": [(x(epoch), epoch) for epoch in range(first, last + 1, step)],
        "kept": x(run.best_epoch) if run.best_epoch and len(epochs) > 1 else None,
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "top": TOP,
        "bottom": HEIGHT - BOTTOM,
    }


def _ticks(highest: float) -> list[float]:
    """Round numbers from 0 to at least the highest value."""
    for step in (base * 10.0**power for power in range(-6, 7) for base in (1, 2, 2.5, 5)):
        if 5 * step >= highest:
            return [
                round(step * i, 9) for i in range(next(n for n in range(1, 6) if n * step >= highest) + 1)
            ]
    return [0.0, highest]


def _apart(places: Iterable[float], gap: float = 15) -> list[float]:
    """Sorted places moved down so far that labels at them do not touch."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap) if moved else place)
    return moved
