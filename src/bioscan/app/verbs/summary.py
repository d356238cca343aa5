"""`bioscan summary`."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import polars as pl
from cyclopts import Parameter

from bioscan.app import output as out
from bioscan.app.flags import Json, Overwrite
from bioscan.errors import ImageError, RequestError, unknown
from bioscan.files import refuse_existing, writing_folder
from bioscan.vocabulary import BARCODE_CUT, BARCODE_LENGTH, EXPERIMENTS, RANKS, ROLES

if TYPE_CHECKING:
    from bioscan.analysis.summary import Summary
    from bioscan.data.images import Images

EXAMPLE_RANKS = ("order", "family")
MAX_EXAMPLES = 120
"""Pictures on one contact sheet."""


def run(
    metadata: Path,
    /,
    *,
    rank: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = ("order", "family"),
    limit: int = 20,
    skip: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = (),
    images: Path | None = None,
    figures: Path | None = None,
    csv: Path | None = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Statistics of a dataset: taxa, classes, BINs, barcodes, plates; whole, and by experiment and role.

    A taxon is its path, not its name: one genus name in two orders counts as two taxa.

    Args:
        metadata: Catalogue or TSV.
        rank: Ranks whose taxa are listed; CSV and JSON hold all ranks.
        limit: Taxa and classes listed of each rank and experiment (0: all).
        skip: Leave out `barcodes` or `plates`, which take longest.
        images: Package of images, for an example picture of each order and family among the figures.
        figures: New folder for figures (PNG), example pictures and a sunburst of the taxonomy (HTML).
        csv: New folder for the tables, one CSV file each.
    """
    from bioscan.data.metadata import scan_metadata
    from bioscan.jobs.summary import summarise

    for name in rank:
        if name not in RANKS:
            raise unknown("rank", name, RANKS)
    if limit < 0:
        raise RequestError(f"--limit is {limit}; 0 lists all")
    if images is not None and figures is None:
        raise RequestError("--images gives example pictures among the figures: say --figures FOLDER too")
    if figures is not None and csv is not None and figures.absolute() == csv.absolute():
        raise RequestError(f"--figures and --csv are one folder, {csv}; name two")
    for folder in (figures, csv):
        if folder is not None and (not folder.is_dir() or any(folder.iterdir())):
            refuse_existing(folder, overwrite=overwrite)
    package = None
    if images is not None:
        from bioscan.data.images import Images

        package = Images(images)
    table = scan_metadata(metadata)
    summary = summarise(table, skip=skip)
    failures: list[ImageError] = []
    written: dict[str, list[str]] = {}
    if csv is not None:
        with writing_folder(csv, overwrite=overwrite) as partial:
            for name, content in summary.tables().items():
                content.write_csv(partial / f"{name}.csv")
            written[str(csv)] = sorted(p.name for p in partial.iterdir())
    if figures is not None:
        with writing_folder(figures, overwrite=overwrite) as partial:
            failures = draw(summary, table, partial, title=metadata.stem, images=package)
            written[str(figures)] = sorted(p.name for p in partial.iterdir())
    if json:
        listed = [{"image": e.name, "place": e.place, "reason": e.reason} for e in failures]
        out.show(out.to_json({**summary.to_dict(), "unreadable_pictures": listed}))
    else:
        out.show(text(summary, metadata.name, ranks=rank, limit=limit))
        for folder_name, names in written.items():
            out.show(f"\n{folder_name}: {', '.join(names)}")
    if failures:
        number = _count(len(failures), "example picture")
        out.say(f"bioscan summary: {number} could not be read (first: {failures[0]})")
    return 1 if failures else 0


def draw(
    summary: "Summary", table: pl.LazyFrame, folder: Path, *, title: str, images: "Images | None"
) -> list[ImageError]:
    """Fill a folder with the figures; returns the pictures that could not be read."""
    from bioscan.analysis.taxonomy import Taxonomy
    from bioscan.app import figures
    from bioscan.app.sunburst import sunburst_html

    for stem, figure in figures.summary_figures(summary).items():
        figures.save(figure, folder / f"{stem}.png")
    ranks = rings(summary)
    if ranks:
        lineages = [r for r in RANKS if r in summary.ranks["rank"]]
        tree = Taxonomy.build(table.select(lineages).collect(engine="streaming"), ranks)
        page = sunburst_html(tree, title=f"Taxonomy of {title}")
        (folder / "taxonomy.html").write_text(page, encoding="utf-8")
    return _draw_examples(summary, table, folder, images) if images is not None else []


def rings(summary: "Summary") -> list[str]:
    """Ranks worth a ring: with taxa, and not one single taxon above all others."""
    named = [row["rank"] for row in summary.ranks.to_dicts() if row["rank"] in RANKS and row["taxa"]]
    while len(named) > 1 and summary.rank(named[0])["taxa"] == 1:
        del named[0]
    return named


def _draw_examples(
    summary: "Summary", table: pl.LazyFrame, folder: Path, images: "Images"
) -> list[ImageError]:
    from bioscan.app.gallery import contact_sheet
    from bioscan.jobs.summary import examples

    failures: dict[str, ImageError] = {}
    for rank in EXAMPLE_RANKS:
        taxa = summary.taxa_of(rank)
        if taxa.is_empty():
            continue
        found, failed = examples(table, images, rank)
        failures |= {f"{error.name} {error.place}": error for error in failed}
        shown = taxa.filter(pl.col("path").is_in(list(found))).head(MAX_EXAMPLES)
        pictures = [
            (f"{name}\n{specimens:,} specimens", found[path].pixels)
            for name, path, specimens in shown.select("taxon", "path", "specimens").iter_rows()
        ]
        if not pictures:
            raise RequestError(f"{images.path} has no readable picture that the metadata name")
        title = f"An example of each {rank}: {shown.height:,} of {taxa.height:,}"
        sheet = contact_sheet(pictures, title=title)
        sheet.save(folder / f"examples_{rank}.png")
    return list(failures.values())


# -- text


def text(summary: "Summary", source: str, *, ranks: tuple[str, ...], limit: int) -> str:
    """The statistics for eyes: every number with what it is and of how many."""
    return "\n".join(_lines(summary, source, ranks, limit))


def _lines(summary: "Summary", source: str, ranks: tuple[str, ...], limit: int) -> Iterator[str]:
    from bioscan.analysis.summary import BIN, FEW_BELOW, MANY_ABOVE

    yield f"{source}: {_count(summary.specimens, 'specimen')}"
    yield ""
    rows = summary.ranks.to_dicts()
    width = max((len(row["rank"]) for row in rows), default=0) + 1
    for row in rows:
        yield f"{(row['rank'].replace(BIN, 'BIN') + ':').ljust(width)} {_level(row)}"
    for row in rows:
        if row["rank"] in ranks and row["taxa"]:
            yield ""
            yield (
                f"{row['rank']}: of {_count(row['taxa'], 'taxon', 'taxa')}, {row['many']:,} have more than"
                f" {MANY_ABOVE} specimens, {row['medium']:,} have {FEW_BELOW} to {MANY_ABOVE},"
                f" {row['few']:,} fewer than {FEW_BELOW}"
            )
            yield from _taxa(summary.taxa_of(row["rank"]), limit)
    if summary.bins is not None and summary.bins.size:
        bins = summary.bins
        yield ""
        yield (
            f"specimens per BIN: {_spread(bins)};"
            f" {bins.count(1, 1):,} of {bins.size:,} BINs have one specimen"
        )
    yield from _experiments(summary, limit)
    yield from _barcodes(summary)
    if summary.plates is not None:
        plates = summary.plates
        yield ""
        yield (
            f"plates: {plates.size:,}, which hold {plates.total:,} of {summary.specimens:,} specimens;"
            f" specimens per plate: {_spread(plates)}"
        )
    if summary.absent:
        yield ""
        by_reason: dict[str, list[str]] = {}
        for what, reason in summary.absent.items():
            short = "no such column" if reason.startswith("no column") else reason
            by_reason.setdefault(short, []).append(what)
        for reason, names in by_reason.items():
            yield f"not counted: {', '.join(names)} ({reason})"


def _level(row: dict[str, Any]) -> str:
    from bioscan.analysis.summary import BIN

    one, several = ("BIN", "BINs") if row["rank"] == BIN else ("taxon", "taxa")
    parts = [
        _count(row["taxa"], one, several),
        f"{row['labelled']:,} of {row['specimens']:,} labelled{_percent(row['labelled_share'])}",
    ]
    if row["names"] != row["taxa"]:
        parts[0] += f" of {_count(row['names'], 'name')}"
    if row["taxa"]:
        parts.append(f"{_count(row['singletons'], 'singleton')}")
    if row["taxa"] > 1 and row["largest"] == row["smallest"]:
        parts.append(f"each of {_count(row['largest'], 'specimen')}")
    elif row["taxa"] > 1:
        parts.append(
            f"imbalance {row['imbalance']:,.1f} : 1 ({row['largest_taxon']} {row['largest']:,} :"
            f" {row['smallest_taxon']} {row['smallest']:,})"
        )
    return ", ".join(parts)


def _taxa(taxa: pl.DataFrame, limit: int) -> Iterator[str]:
    shown = taxa.head(limit) if limit else taxa
    rows = [
        [_name(name, path, shown), specimens, f"{100 * share:.2f}%"]
        for name, path, specimens, share in shown.select(
            "taxon", "path", "specimens", "share_of_labelled"
        ).iter_rows()
    ]
    yield out.table(rows, ["taxon", "specimens", "of labelled"], indent="  ")
    rest = taxa.slice(shown.height)
    if rest.height:
        specimens = _count(int(rest["specimens"].sum()), "specimen")
        yield f"  … and {_count(rest.height, 'taxon', 'taxa')} more with {specimens}"


_OF_ROLE = {
    "labelled": "labelled",
    "taxa": "classes",
    "singletons": "singletons",
    "smallest": "smallest",
    "largest": "largest",
}
"""Columns of `Summary.experiments` shown for each role -> how they are called."""


def _experiments(summary: "Summary", limit: int) -> Iterator[str]:
    from bioscan.analysis.summary import BIN, TOTAL

    unused = []
    for name in summary.experiments["experiment"].unique(maintain_order=True):
        own = summary.experiments.filter(pl.col("experiment") == name)
        rank = EXPERIMENTS[name].rank
        levels = own.filter(pl.col("rank").is_in([rank, BIN])).to_dicts()
        by_role = {row["role"]: row for row in levels if row["rank"] == rank}
        bins = {row["role"]: row["taxa"] for row in levels if row["rank"] == BIN}
        sizes = dict(own.unique("role", maintain_order=True).select("role", "specimens").iter_rows())
        if not sizes[TOTAL]:
            unused.append(name)
            continue
        yield ""
        classes = summary.classes_of(name)
        yield (
            f"{name}: {sizes[TOTAL]:,} of {summary.specimens:,} specimens have a role,"
            f" {_count(classes.height, 'class', 'classes')} at rank {rank}"
        )
        table = [
            [
                *(role, size, f"{100 * size / sizes[TOTAL]:.1f}%"),
                *(by_role.get(role, {}).get(column) for column in _OF_ROLE),
                _one_decimal(by_role.get(role, {}).get("imbalance")),
                *([bins[role]] if bins else []),
            ]
            for role, size in sizes.items()
        ]
        header = ["role", "specimens", "share", *_OF_ROLE.values(), "imbalance", *(["BINs"] if bins else [])]
        yield out.table(table, header, indent="  ")
        shown = classes.head(limit) if limit else classes
        rows = [
            [_name(row["taxon"], row["path"], shown), *(row[role] for role in (*ROLES, TOTAL))]
            for row in shown.to_dicts()
        ]
        yield out.table(rows, ["class", *ROLES, TOTAL], indent="  ")
        rest = classes.slice(shown.height)
        if rest.height:
            specimens = _count(int(rest[TOTAL].sum()), "specimen")
            yield f"  … and {_count(rest.height, 'class', 'classes')} more with {specimens}"
    if unused:
        yield ""
        yield f"{', '.join(unused)}: no specimen has a role"


def _barcodes(summary: "Summary") -> Iterator[str]:
    codes = summary.barcodes
    if codes is None:
        return
    yield ""
    yield f"barcodes: {codes.present:,} of {summary.specimens:,} specimens have one"
    if not codes.present:
        return
    of = f"of {codes.present:,}"
    yield f"  length in characters: {_spread(codes.lengths)}"
    yield (
        f"  {codes.standard:,} {of} have {BARCODE_LENGTH} characters, {codes.over:,} more than {BARCODE_CUT}"
    )
    yield (
        f"  {codes.with_n:,} {of} hold N ({100 * (codes.n_share or 0):.3f} % of all characters),"
        f" {codes.with_gap:,} gaps, {codes.with_other:,} other letters"
    )
    yield (
        f"  {codes.distinct:,} different ones; {codes.shared:,} {of} specimens share theirs with another,"
        f" the commonest has {codes.commonest:,}"
    )


def _spread(numbers: Any) -> str:
    quantiles = " / ".join(f"{numbers.quantile(q):,}" for q in (0.25, 0.5, 0.75))
    return (
        f"{numbers.quantile(0.0):,} to {numbers.quantile(1.0):,}, quartiles {quantiles},"
        f" mean {numbers.mean:,.1f}"
    )


def _name(name: str, path: str, shown: pl.DataFrame) -> str:
    """The name; of homonyms the path."""
    return path if (shown["taxon"] == name).sum() > 1 else name


def _one_decimal(number: float | None) -> str:
    return out.cell(None) if number is None else f"{number:,.1f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f" ({100 * share:.1f} %)"


def _count(number: int, one: str, several: str = "") -> str:
    return f"{number:,} {one if number == 1 else several or one + 's'}"
