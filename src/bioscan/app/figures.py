"""Figures of a dataset, for Matplotlib, with one palette for all pages and pictures.

Each function returns a `Figure`; `save` writes it as PNG or SVG. Nothing global is changed: no pyplot, no
style, no backend.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import polars as pl

from bioscan.analysis.summary import BIN, TOTAL, Barcodes, Distribution, Summary
from bioscan.errors import require
from bioscan.vocabulary import BARCODE_CUT, BARCODE_LENGTH, EXPERIMENTS, NO_SPLIT, RANKS, ROLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROLE_COLOURS: Final = {"train": "#0072B2", "validation": "#E69F00", "test": "#009E73", NO_SPLIT: "#B8B8B8"}
ROLE_MARKERS: Final = {"train": "o", "validation": "D", "test": "s"}
CLASS_COLOURS: Final = (
    *("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442"),
    *("#332288", "#88CCEE", "#117733", "#999933", "#AA4499", "#882255", "#44AA99"),
)
"""Colours that people with any kind of colour vision can tell apart: Okabe and Ito (2008), without black,
then the "muted" scheme of Paul Tol."""
BAR: Final = "#0072B2"
REST: Final = "#D9D9D9"
INK: Final = "#262626"

MAX_BARS: Final = 40
_BAR_INCHES: Final = 0.235
_DPI: Final = 150


def save(figure: "Figure", path: Path) -> None:
    """Write the figure in the form that the name ends in (.png, .svg, .pdf); equal figures, equal bytes."""
    fixed: dict[str, Any] = {"Software": None} if path.suffix == ".png" else {"Date": None}
    with require("matplotlib", "report").rc_context({"svg.hashsalt": "bioscan"}):
        figure.savefig(path, dpi=_DPI, metadata=fixed)


def summary_figures(summary: Summary, *, max_bars: int = MAX_BARS) -> dict[str, "Figure"]:
    """Every figure that the statistics have numbers for, by file stem."""
    made = {"ranks": label_shares(summary)} if summary.specimens and summary.ranks.height else {}
    for rank in ("order", "family"):
        taxa = summary.taxa_of(rank)
        if not taxa.is_empty():
            made[f"classes_{rank}"] = class_counts(taxa, rank, max_bars=max_bars)
    if summary.bins is not None and summary.bins.size:
        made["bins"] = bin_sizes(summary.bins)
    if summary.barcodes is not None and summary.barcodes.present:
        made["barcode_lengths"] = barcode_lengths(summary.barcodes)
    used = [name for name in EXPERIMENTS if not summary.classes_of(name).is_empty()]
    if used:
        made["experiments"] = experiment_sizes(summary)
    for name in used:
        made[f"roles_{name}"] = class_roles(summary.classes_of(name), name, max_bars=max_bars)
    return made


def label_shares(summary: Summary) -> "Figure":
    """How many specimens are labelled at each rank, and with how many taxa: bars to 100 %."""
    rows = summary.ranks.to_dicts()
    figure, axes = _figure(7.2, 1.3 + 0.36 * len(rows))
    names = ["BIN" if row["rank"] == BIN else row["rank"] for row in rows]
    shares = [100 * (row["labelled_share"] or 0.0) for row in rows]
    axes.barh(names, 100, color=REST, height=0.72)
    axes.barh(names, shares, color=BAR, height=0.72)
    for place, (row, share) in enumerate(zip(rows, shares, strict=True)):
        taxa = "BIN" if row["rank"] == BIN else "taxon" if row["taxa"] == 1 else "taxa"
        taxa += "s" if row["rank"] == BIN and row["taxa"] != 1 else ""
        text = f"{row['labelled']:,} ({share:.1f} %), {row['taxa']:,} {taxa}"
        inside = share > 55
        axes.text(
            share - 1 if inside else share + 1,
            place,
            text,
            va="center",
            ha="right" if inside else "left",
            color="white" if inside else INK,
            fontsize=8.5,
        )
    axes.set_xlim(0, 100)
    axes.set_xlabel(f"labelled specimens, % of {summary.specimens:,}")
    axes.invert_yaxis()
    _title(axes, "Labels at each rank")
    axes.tick_params(axis="y", length=0)
    return figure


def class_counts(taxa: pl.DataFrame, rank: str, *, max_bars: int = MAX_BARS) -> "Figure":
    """Specimens of each class, most first, on a log scale, each bar with its count.

    Args:
        taxa: `taxon`, `path` and `specimens`, most specimens first (`Summary.taxa_of`).
        rank: For the title.
        max_bars: Classes shown; the title counts the others and their specimens.
    """
    shown = taxa.head(max_bars)
    counts = shown["specimens"].to_list()
    figure, axes = _figure(7.2, 1.35 + _BAR_INCHES * shown.height)
    places = np.arange(shown.height)
    floor = 0.6  # below one specimen, so that a bar of one can be seen
    axes.barh(places, [c - floor for c in counts], left=floor, color=BAR, height=0.76)
    _log_counts(axes, floor, max(counts) * 4)
    for place, count in enumerate(counts):
        axes.text(count * 1.12, place, f"{count:,}", va="center", fontsize=8, color=INK)
    _class_names(axes, _told_apart(shown))
    axes.set_xlabel("specimens (log scale)")
    ratio = f", largest to smallest {_ratio(taxa['specimens'].max(), taxa['specimens'].min())}"
    head = f"Specimens by {rank}: {_taxa(taxa.height)}{ratio if taxa.height > 1 else ''}"
    _title(axes, head + _left_out(taxa, max_bars, "specimens"))
    return figure


def class_roles(classes: pl.DataFrame, experiment: str, *, max_bars: int = MAX_BARS) -> "Figure":
    """Train, validation and test specimens of each class of an experiment, as dots on a log scale.

    Args:
        classes: Rows of `Summary.classes` of one experiment, most specimens first.
        experiment: Its name.
        max_bars: Classes shown; the title counts the others.
    """
    shown = classes.head(max_bars)
    figure, axes = _figure(7.2, 1.75 + _BAR_INCHES * shown.height)
    places = np.arange(shown.height)
    counted = shown.select(*ROLES).to_numpy()
    positive = np.where(counted > 0, counted, np.nan)
    axes.hlines(places, np.nanmin(positive, 1), np.nanmax(positive, 1), color=REST, linewidth=2, zorder=1)
    totals = {role: int(classes[role].sum()) for role in ROLES}
    for role, column in zip(ROLES, positive.T, strict=True):
        axes.scatter(
            *(column, places),
            s=26,
            color=ROLE_COLOURS[role],
            marker=ROLE_MARKERS[role],
            label=f"{role} ({totals[role]:,})",
            zorder=2,
            edgecolor="white",
            linewidth=0.5,
        )
    _log_counts(axes, 0.7, max(2.0, float(counted.max())) * 2)
    _class_names(axes, _told_apart(shown))
    axes.set_xlabel("specimens (log scale; no mark: none)")
    head = f"{experiment}: {_taxa(classes.height, 'class', 'classes')}, {sum(totals.values()):,} specimens"
    _title(axes, head + _left_out(classes, max_bars, TOTAL))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def experiment_sizes(summary: Summary) -> "Figure":
    """How many specimens have which role in each experiment: bars to 100 % of the dataset."""
    rank = summary.ranks["rank"][0]
    rows = summary.experiments.filter((pl.col("rank") == rank) & (pl.col("role") != TOTAL))
    names = [n for n in EXPERIMENTS if n in rows["experiment"].unique().to_list()]
    figure, axes = _figure(7.2, 1.6 + 0.4 * len(names))
    left = np.zeros(len(names))
    for role in ROLES:
        counts = np.array(
            [
                rows.filter((pl.col("experiment") == n) & (pl.col("role") == role))["specimens"].item()
                for n in names
            ]
        )
        axes.barh(names, counts, left=left, color=ROLE_COLOURS[role], height=0.7, label=role)
        left += counts
    axes.barh(
        names,
        summary.specimens - left,
        left=left,
        color=ROLE_COLOURS[NO_SPLIT],
        height=0.7,
        label="no role",
    )
    for place, total in enumerate(left):
        text = f"{int(total):,} "
        inside = total > 0.25 * summary.specimens
        axes.text(
            total if inside else total + 0.01 * summary.specimens,
            place,
            text,
            va="center",
            ha="right" if inside else "left",
            color="white" if inside else INK,
            fontsize=8.5,
        )
    axes.set_xlim(0, summary.specimens)
    axes.xaxis.set_major_formatter(_thousands())
    axes.xaxis.set_major_locator(require("matplotlib.ticker", "report").MaxNLocator(5, integer=True))
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("specimens; the number is train, validation and test together")
    _title(axes, f"Roles in each experiment, of {summary.specimens:,} specimens")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def bin_sizes(bins: Distribution) -> "Figure":
    """Specimens per BIN, log-log: how many BINs of each size, and the BINs in order of size."""
    figure, (left, right) = _figure(9.6, 4.2, columns=2)
    left.scatter(bins.values_V, bins.counts_V, s=12, color=BAR, alpha=0.75, linewidth=0)
    left.set(xscale="log", yscale="log", xlabel="specimens in the BIN", ylabel="BINs of that size")
    singles = bins.count(1, 1)
    _title(
        left,
        f"{bins.size:,} BINs of {bins.total:,} specimens\n"
        f"{singles:,} ({100 * singles / bins.size:.1f} %) have one specimen",
    )
    sizes, numbers = bins.values_V[::-1], bins.counts_V[::-1]
    last = np.cumsum(numbers)
    first = last - numbers + 1
    right.plot(
        np.column_stack([first, last]).ravel(),
        np.repeat(sizes, 2),
        color=BAR,
        linewidth=2,
    )
    right.set(xscale="log", yscale="log", xlabel="BIN, the largest first", ylabel="specimens in the BIN")
    _title(
        right,
        f"median {bins.quantile(0.5):,}, mean {bins.mean:,.1f},\nlargest {bins.quantile(1.0):,} specimens",
    )
    for axes in (left, right):
        axes.xaxis.set_major_formatter(_thousands())
        axes.yaxis.set_major_formatter(_thousands())
        axes.grid(which="major", color="#E6E6E6", linewidth=0.7)
        axes.set_axisbelow(True)
    left.set_ylim(bottom=0.6)
    right.set_ylim(bottom=0.6)
    return figure


def barcode_lengths(barcodes: Barcodes) -> "Figure":
    """Lengths of the barcodes, counts on a log scale, with the two lengths that matter marked."""
    lengths = barcodes.lengths
    figure, axes = _figure(7.2, 3.8)
    low, high = int(lengths.values_V[0]), int(lengths.values_V[-1])
    step = max(1, -(-(high - low + 1) // 160))
    edges = np.arange(low, high + step + 1, step)
    counts, _ = np.histogram(lengths.values_V, edges, weights=lengths.counts_V)
    axes.bar(edges[:-1] - 0.5, counts, width=step, align="edge", color=BAR, linewidth=0)
    axes.set_yscale("log")
    axes.set_ylim(0.6, counts.max() * 3)
    axes.set_xlim(min(low, BARCODE_LENGTH) - 3 * step, max(high, BARCODE_CUT) + 3 * step)
    axes.axvline(BARCODE_LENGTH, color=CLASS_COLOURS[5], linewidth=1.2)
    axes.text(
        BARCODE_LENGTH,
        0.97,
        f"exactly {BARCODE_LENGTH}: {barcodes.standard:,}  ",
        ha="right",
        va="top",
        color=CLASS_COLOURS[5],
        fontsize=8.5,
        transform=axes.get_xaxis_transform(),
    )
    axes.yaxis.set_major_formatter(_thousands())
    axes.set_xlabel("characters, as given" + (f" (bars of {step})" if step > 1 else ""))
    axes.set_ylabel("barcodes (log scale)")
    _title(
        axes,
        f"Barcode lengths: {barcodes.present:,} of {barcodes.present + barcodes.missing:,} specimens\n"
        f"median {lengths.quantile(0.5):,}, {lengths.quantile(0.0):,} to {lengths.quantile(1.0):,};"
        f" longer than {BARCODE_CUT}: {barcodes.over:,}",
    )
    return figure


# -- parts


def _figure(width: float, height: float, *, columns: int = 1) -> tuple["Figure", Any]:
    made = require("matplotlib.figure", "report").Figure(figsize=(width, height), layout="constrained")
    axes = made.subplots(1, columns)
    for each in np.atleast_1d(axes):
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(labelsize=8.5, colors=INK)
        each.xaxis.label.set(size=9, color=INK)
        each.yaxis.label.set(size=9, color=INK)
    return made, axes


def _title(axes: "Axes", text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10.5, color=INK)


def _log_counts(axes: "Axes", low: float, high: float) -> None:
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.xaxis.set_major_formatter(_thousands())
    axes.grid(axis="x", which="major", color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)


def _class_names(axes: "Axes", names: Sequence[str]) -> None:
    axes.set_yticks(np.arange(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def _told_apart(taxa: pl.DataFrame) -> list[str]:
    """Names of the taxa; of homonyms with the order or family that they are in."""
    twice = set(taxa.filter(pl.col("taxon").is_duplicated())["taxon"])
    return [
        f"{name} ({_above(path)})" if name in twice else name
        for name, path in taxa.select("taxon", "path").iter_rows()
    ]


def _above(path: str) -> str:
    names = path.split(";")[:-1]
    order = RANKS.index("order")
    return (names[order] if len(names) > order else "") or next((n for n in reversed(names) if n), "?")


def _left_out(taxa: pl.DataFrame, max_bars: int, column: str) -> str:
    rest = taxa.slice(max_bars)
    if rest.is_empty():
        return ""
    return f"\nthe {max_bars} largest; the other {rest.height:,} have {int(rest[column].sum()):,} specimens"


def _taxa(number: int, one: str = "taxon", several: str = "taxa") -> str:
    return f"{number:,} {one if number == 1 else several}"


def _ratio(largest: Any, smallest: Any) -> str:
    return f"{largest / smallest:,.0f} : 1" if largest >= 10 * smallest else f"{largest / smallest:.1f} : 1"


def _thousands() -> Any:
    return require("matplotlib.ticker", "report").FuncFormatter(lambda value, _: f"{value:,.10g}")
