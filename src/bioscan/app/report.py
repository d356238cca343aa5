"""One self-contained HTML page of a run: its record, curves, scores, errors, data and licences.

The page asks the network for nothing, and no name in it is ever read as HTML. Charts are SVG in the page's
own colours, light and dark.
"""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import polars as pl

from bioscan.analysis.splits import role_counts
from bioscan.app import charts, scores
from bioscan.app.accuracy_tree import AccuracyTree, accuracy_tree
from bioscan.app.beliefs import beliefs
from bioscan.app.output import cell
from bioscan.data.decode import read_rgb
from bioscan.data.images import Images
from bioscan.data.metadata import fingerprint, read_metadata, scan_metadata
from bioscan.errors import DataError, ImageError, RequestError, require
from bioscan.files import refuse_existing, refuse_input, writing
from bioscan.jobs.evaluate import KS, Evaluation, Score, evaluate, evaluate_ranks
from bioscan.jobs.evaluate_hierarchy import METRICS, Hierarchy, evaluate_hierarchy
from bioscan.vocabulary import RANKS, ROLES

WORST: Final = 18
"""Errors shown by confidence."""
FURTHEST: Final = 12
"""Errors shown by taxonomic distance."""
THUMBNAIL: Final = 224
"""Longer side of a picture in the page, pixels."""
LISTED: Final = 200
"""Taxa in the table, the most populous ones."""
CONFUSIONS: Final = 15

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
    weights_sha256: str | None
    """Stays when the model is calibrated anew."""
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
    told: str = ""
    """What else is known of it."""


Gallery = tuple[str, str, list[Picture]]
"""Heading, a line about the order, and the errors."""


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
    refuse_input(output, predictions, catalogue)
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
    if of_run and not _may_be_of(of_run, found.record):
        raise RequestError(f"the model in {run} did not make these predictions; name the run that did")
    by_rank, hierarchy = _up_the_tree(
        found, predictions, catalogue, experiment=experiment, role=role, within=within, seed=seed
    )
    frame = _catalogue(catalogue, found)
    pictures = _galleries(found, by_rank, hierarchy, frame, package)
    page = render(
        found,
        by_rank=by_rank,
        hierarchy=hierarchy,
        tree=accuracy_tree(by_rank, frame),
        run=of_run,
        data=_data(found, frame, fingerprint(catalogue), Path(catalogue).name),
        pictures=pictures,
        has_package=package is not None,
        title=title,
    )
    with writing(output, overwrite=overwrite) as partial:
        partial.write_text(page, encoding="utf-8")
    shown = {p.key: p for _, _, gallery in pictures for p in gallery}
    failed = [{"key": key, "error": p.reason} for key, p in shown.items() if p.reason]
    num = sum(p.source is not None for p in shown.values())
    return {"report": str(output), "specimens": found.n, "pictures": num, "failed": failed}


def _up_the_tree(
    found: Evaluation,
    predictions: Path | str,
    catalogue: Path | str,
    *,
    experiment: str | None,
    role: str | None,
    within: str | None,
    seed: int,
) -> tuple[dict[str, Evaluation], Hierarchy | None]:
    """The evaluations at every rank and of the whole paths.

    Only the one at hand where no specimen has a name at a rank of the model, or nothing is named.
    """
    try:
        by_rank = evaluate_ranks(
            predictions,
            catalogue,
            experiment=experiment,
            role=role,
            within=within,
            ks=(1,),
            sets=(),
            seed=seed,
        )
        hierarchy = evaluate_hierarchy(
            predictions, catalogue, experiment=experiment, role=role, within=within, seed=seed
        )
    except RequestError:  # what else could be asked wrongly, `found` would have told
        return {found.rank: found}, None
    return by_rank, hierarchy


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
        weights_sha256=info.get("weights_sha256"),
        failed=max(0, len(_lines(failed)) - 1) if failed.is_file() else 0,
    )


def _may_be_of(run: Run, record: Mapping[str, Any]) -> bool:
    """Whether the run's model can have made predictions with this record; its weights decide if known."""
    known = (run.weights_sha256, record.get("weights_sha256"))
    if None in known:
        known = (run.content_sha256, record.get("model_sha256"))
    return None in known or known[0] == known[1]


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
    wanted = {found.key, "image_file", "chunk_number", *RANKS, found.experiment, *LICENCE_COLUMNS}
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


def _galleries(
    found: Evaluation,
    by_rank: Mapping[str, Evaluation],
    hierarchy: Hierarchy | None,
    frame: pl.DataFrame,
    package: Images | None,
) -> list[Gallery]:
    """Wrong answers, the most confident and the furthest from the truth first.

    Specimens without an answer are no such errors. Where all errors are equally far, there is one gallery.
    """
    answered = pl.col("named").is_not_null()
    sure = found.errors().filter(answered).with_columns(told=pl.lit(""))
    galleries = [
        (
            "The most confident",
            f"Wrong names at rank {found.rank}, those given with the highest probability first.",
            sure.head(WORST),
        )
    ]
    if hierarchy and (parting := _parting(by_rank, hierarchy).filter(answered))["rank"].n_unique() > 1:
        told = pl.format("instead of {} {}, {} steps away", "rank", "taxon", "distance")
        galleries.append(
            (
                "The furthest from the truth",
                "By the rank from which the name is wrong, the highest first; then by the steps along the "
                "tree between the name and the truth, and by probability.",
                parting.head(FURTHEST).with_columns(told=told, taxon="deepest"),
            )
        )
    every = pl.concat([errors.select(found.key) for _, _, errors in galleries]).unique(maintain_order=True)
    photographs = _photographs(every.join(frame, on=found.key, how="left", maintain_order="left"), package)
    sources = dict(zip(every[found.key], photographs, strict=True))
    return [
        (title, text, [_picture(row, *sources[row[found.key]]) for row in errors.to_dicts()])
        for title, text, errors in galleries
        if errors.height
    ]


def _picture(row: Mapping[str, Any], source: str | None, reason: str | None) -> Picture:
    key = next(iter(row.values()))
    return Picture(key, row["taxon"], row["named"], row["probability"], source, reason, row["told"])


def _parting(by_rank: Mapping[str, Evaluation], hierarchy: Hierarchy) -> pl.DataFrame:
    """The errors at the highest rank at which each is one, by rank, root down, and falling distance.

    Columns as those of `errors`; `rank`; `deepest`: the specimen's own name at the deepest rank; `distance`.
    """
    key = hierarchy.key
    wrong = [
        found.errors().with_columns(rank=pl.lit(rank), place=pl.lit(RANKS.index(rank)))
        for rank, found in by_rank.items()
    ]
    parting = pl.concat(wrong, how="vertical_relaxed").unique(key, keep="first", maintain_order=True)
    told = hierarchy.specimens.select(key, "distance", deepest="taxon")
    joined = parting.join(told, on=key, how="inner", maintain_order="left")
    return joined.sort("place", "distance", descending=[False, True], maintain_order=True)


def _photographs(rows: pl.DataFrame, package: Images | None) -> list[tuple[str | None, str | None]]:
    """A `data:` address of each row's picture, or why there is none; neither without a package."""
    if package is None or "image_file" not in rows.columns:
        return [(None, None)] * rows.height
    parts = rows["chunk_number"] if "chunk_number" in rows.columns else None
    return [_thumbnail(package, int(at)) for at in package.find(rows["image_file"], parts)]


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
    by_rank: Mapping[str, Evaluation],
    hierarchy: Hierarchy | None,
    tree: AccuracyTree | None,
    run: Run | None,
    data: Mapping[str, Any],
    pictures: Sequence[Gallery],
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
    environment.filters |= {"cell": cell, "percent": _percent, "setting": _setting, "ends": _ends}
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
        believe=beliefs(found, hierarchy),
        by_rank=by_rank,
        hierarchy=hierarchy,
        **_paths(hierarchy),
        tree=tree,
        not_computable=found.not_computable,
        buckets=found.buckets.filter(pl.col("specimens") > 0).to_dicts(),
        sets=_sets(found),
        set_key=list(SIZES),
        set_warnings=_warnings(found.sets),
        **_confidence(found),
        metric_rows=metric_rows,
        metric_header=metric_header,
        small=found.per_class.filter(pl.col("support").is_between(1, 4)).height,
        classes=found.per_class.head(LISTED).to_dicts(),
        num_classes=found.per_class.height,
        matrix=charts.matrix(found.per_class, found.confusion),
        confusions=_confusions(found),
        curves=charts.history(run.history, run.best_epoch) if run and run.history else [],
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


def _ends(of: Any) -> str:
    """Both ends of an interval in per cent."""
    low, high = (of["low"], of["high"]) if isinstance(of, Mapping) else (of.low, of.high)
    if low is None or high is None or math.isnan(low):
        return "–"
    return f"{100 * low:.1f}–{100 * high:.1f}"


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


def _confusions(found: Evaluation) -> list[dict[str, Any]]:
    support = found.per_class.select("taxon", "support")
    wrong = found.confusion.filter(pl.col("named").ne_missing(pl.col("taxon")))
    shares = wrong.join(support, on="taxon", maintain_order="left").with_columns(
        pl.col("named").fill_null(charts.NO_ANSWER), share=pl.col("specimens") / pl.col("support")
    )
    return shares.sort("specimens", descending=True, maintain_order=True).head(CONFUSIONS).to_dicts()


# -- paths and confidence


def _paths(hierarchy: Hierarchy | None) -> dict[str, Any]:
    """Tables and chart of whole paths: empty where the answers have one rank, or go down all the way."""
    made: dict[str, Any] = {"assigned": [], "hierarchy_rows": [], "operating": []}
    if hierarchy is None:
        return made
    asked = (hierarchy.max_error, hierarchy.min_precision) != (None, None)
    if asked or not _equal(hierarchy.metrics, hierarchy.assigned_metrics):
        made["assigned"] = hierarchy.assigned.to_dicts()
    if len(hierarchy.ranks) > 1:
        made["hierarchy_rows"] = [
            (
                name.replace("_", " ").replace("lca", "LCA").replace("hierarchical f", "hierarchical F"),
                hierarchy.metrics[name],
                hierarchy.assigned_metrics.get(name),
                text,
            )
            for name, text in METRICS.items()
            if name in hierarchy.metrics
        ]
        if hierarchy.operating.height:
            made["operating"] = [charts.operating(hierarchy.operating)]
    return made


def _equal(forced: Mapping[str, Score], assigned: Mapping[str, Score]) -> bool:
    """Whether the assigned names are as many and as right as the forced ones, or nothing is assigned."""
    return all(assigned[name].value == forced[name].value for name in assigned if name in forced)


SIZES: Final = {"none": (0, 0), "1 name": (1, 1), "2–3": (2, 3), "4–10": (4, 10), "more": (11, math.inf)}
"""Sizes of prediction sets told apart: least and greatest."""
KEPT: Final = 20
"""Thresholds listed."""
MARKED: Final = (0.01, 0.05)
"""Shares wrong that the curve marks."""


def _confidence(found: Evaluation) -> dict[str, Any]:
    """Charts and tables of the probabilities; empty where there are none."""
    told = found.confidence
    if told is None:
        return {"confidence": None, "confidence_panels": [], "measures": [], "kept": []}
    curve = told.risk_coverage
    panels = [
        charts.reliability(told.reliability),
        charts.risk_coverage(curve, {r: told.coverage_at[r] for r in MARKED}),
    ]
    places = sorted({round(i * (curve.height - 1) / KEPT) for i in range(KEPT + 1)})
    kept = curve[places].filter(pl.col("threshold").is_not_null())
    known = {
        "calibration error (ECE), bins of equal width": told.ece,
        "the same, bins of equally many specimens": told.ece_mass,
        "the same over the probabilities of all taxa": told.ece_classwise,
        "Brier score (0 to 2)": told.brier,
        "negative log-likelihood": told.nll,
        "area under the right curve (AURC)": told.aurc,
        "the least possible with as many errors": told.aurc_best,
    }
    measures = [
        (
            name,
            f"{value:.4f}"
            if isinstance(value, float)
            else f"{value.value:.4f} ({value.low:.4f}–{value.high:.4f})",
        )
        for name, value in known.items()
        if value is not None
    ]
    return {
        "confidence": told,
        "confidence_panels": panels,
        "measures": measures,
        "kept": kept.to_dicts(),
    }


def _sets(found: Evaluation) -> list[dict[str, Any]]:
    """A row a method, with the share of specimens by size of their set."""
    rows = found.sets.to_dicts()
    for row in rows:
        sizes = found.set_sizes.filter(pl.col("method") == row["method"])
        total = max(1, int(sizes["specimens"].sum()))
        row["shares"] = [
            int(sizes.filter(pl.col("size").is_between(low, high))["specimens"].sum()) / total
            for low, high in SIZES.values()
        ]
    return rows


def _warnings(sets: pl.DataFrame) -> dict[str, list[str]]:
    """Warning -> the methods that it is about."""
    said: dict[str, list[str]] = {}
    for method, warnings in sets.select("method", "warnings").iter_rows():
        for text in warnings or ():
            said.setdefault(text, []).append(method)
    return said
