"""What is wrong or odd in metadata, and the named steps that mend it. Nothing is changed unless a step is
asked for.

A finding is a row: `check`, `subject` (a name, key or rank), `rows` (specimens concerned) and `detail`. Most
rows first.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Final

import polars as pl

from bioscan.analysis.taxonomy import aligned, resolve_paths
from bioscan.errors import RequestError, unknown
from bioscan.vocabulary import BARCODE_CUT, BIN_URI, PLACEHOLDER_PATTERN, RANKS, SAMPLE_ID

FINDING: Final = {"check": pl.String, "subject": pl.String, "rows": pl.Int64, "detail": pl.String}
_BELOW_ORDER = RANKS[RANKS.index("order") + 1 :]
_OFTEN_INTERIM = ("genus", "species", "subspecies")


def check(frame: pl.DataFrame, checks: Iterable[str] | None = None) -> pl.DataFrame:
    """All findings of the named checks (None: of all).

    Args:
        frame: Catalogue columns, missing null; duplicate keys may be in it. A check whose columns are absent
        finds nothing.
        checks: Names in CHECKS.

    Raises:
        RequestError: an unknown check.
    """
    names = list(CHECKS if checks is None else checks)
    for name in names:
        if name not in CHECKS:
            raise unknown("check", name, CHECKS)
    found = [
        CHECKS[name](frame).select(pl.lit(name).alias("check"), "subject", "rows", "detail") for name in names
    ]
    return pl.concat([_empty(), *(f.cast(pl.Schema(FINDING)) for f in found)])


def duplicate_keys(frame: pl.DataFrame) -> pl.DataFrame:
    """Sample ids, process ids and image files (within a part) that occur more than once."""
    found = []
    for column in ("sampleid", "processid", "image_file"):
        if column not in frame.columns:
            continue
        in_part = column == "image_file" and "chunk_number" in frame.columns
        keys = [column, "chunk_number"] if in_part else [column]
        twice = frame.select(keys).filter(pl.col(column).is_not_null() & pl.col(column).is_duplicated())
        counted = twice.group_by(keys).len("rows").filter(pl.col("rows") > 1)
        found.append(counted.select(pl.col(column).alias("subject"), "rows", pl.lit(column).alias("detail")))
    return _sorted(found)


def parent_conflicts(frame: pl.DataFrame) -> pl.DataFrame:
    """Names with different parents within one order: a genus in two families, say."""
    return _conflicts(frame, same_order=True)


def homonyms(frame: pl.DataFrame) -> pl.DataFrame:
    """One name for several taxa: at one rank under different orders, or at two ranks."""
    paths = _paths(frame)
    ranks = [r for r in RANKS if r in frame.columns]
    named = pl.concat(
        [_empty_names()]
        + [
            paths.filter(pl.col(r).is_not_null())
            .group_by(pl.col(r).alias("subject"))
            .agg(pl.col("len").sum().alias("rows"), pl.lit(r).alias("rank").first())
            for r in ranks
        ]
    )
    several = (
        named.group_by("subject", maintain_order=True)
        .agg(pl.col("rows").sum(), pl.col("rank").str.join(", "), pl.len().alias("n"))
        .filter(pl.col("n") > 1)
    )
    at_two = several.select("subject", "rows", ("at ranks " + pl.col("rank")).alias("detail"))
    return _sorted([_conflicts(frame, same_order=False), at_two])


def holes(frame: pl.DataFrame) -> pl.DataFrame:
    """Ranks without a name although a deeper rank has one."""
    ranks = [r for r in RANKS if r in frame.columns]
    found = []
    for place, rank in enumerate(ranks[:-1]):
        deeper = pl.any_horizontal(pl.col(r).is_not_null() for r in ranks[place + 1 :])
        rows = frame.select((pl.col(rank).is_null() & deeper).sum()).item()
        if rows:
            text = "no name here, one at a deeper rank"
            found.append(pl.DataFrame({"subject": [rank], "rows": [rows], "detail": [text]}))
    return _sorted(found)


def species_without_genus(frame: pl.DataFrame) -> pl.DataFrame:
    """Species whose genus is missing, or is not the first word of the species."""
    if not {"species", "genus"} <= set(frame.columns):
        return _empty()
    first = pl.col("species").str.extract(r"^(\S+)")
    odd = frame.filter(pl.col("species").is_not_null() & ~(pl.col("genus").eq_missing(first)))
    odd = odd.filter(pl.col("genus").is_null() | ~_placeholder("species"))
    counted = odd.group_by("species", "genus", maintain_order=True).len("rows")
    text = (
        pl.when(pl.col("genus").is_null())
        .then(pl.lit("genus missing"))
        .otherwise("genus is " + pl.col("genus"))
    )
    return _sorted([counted.select(pl.col("species").alias("subject"), "rows", text.alias("detail"))])


def placeholder_names(frame: pl.DataFrame) -> pl.DataFrame:
    """Genus, species and subspecies names that are interim: with digits, «sp.», a second capital."""
    found = []
    for rank in _OFTEN_INTERIM:
        if rank in frame.columns:
            rows = frame.filter(_placeholder(rank)).group_by(rank, maintain_order=True).len("rows")
            found.append(rows.select(pl.col(rank).alias("subject"), "rows", pl.lit(rank).alias("detail")))
    return _sorted(found)


def duplicate_barcodes(frame: pl.DataFrame) -> pl.DataFrame:
    """How many specimens share their exact barcode, as given, with another: siblings do."""
    if "nucraw" not in frame.columns:
        return _empty()
    counts = frame["nucraw"].drop_nulls().value_counts(name="n").filter(pl.col("n") > 1)["n"]
    if counts.is_empty():
        return _empty()
    detail = f"{counts.len():,} barcodes of more than one specimen, the commonest of {max(counts):,}"
    return pl.DataFrame({"subject": ["nucraw"], "rows": [counts.sum()], "detail": [detail]})


def shared_barcodes(frame: pl.DataFrame) -> pl.DataFrame:
    """Barcodes (cut at base 660, N stripped from the ends) of several specimens that differ in BIN, order or
    family: a mislabel, or a mix-up in the laboratory.
    """
    labels = [c for c in ("uri", "order", "family") if c in frame.columns]
    if "nucraw" not in frame.columns or not labels:
        return _empty()
    keyed = frame.filter(pl.col("nucraw").is_not_null()).select(barcode_key().alias("barcode"), *labels)
    found = _differing(keyed.filter(pl.col("barcode").is_duplicated()), "barcode", labels)
    return _sorted([found.with_columns(pl.col("subject").str.head(40))])


def bins_across_taxa(frame: pl.DataFrame) -> pl.DataFrame:
    """BINs whose specimens have different orders or families."""
    labels = [c for c in ("order", "family") if c in frame.columns]
    if "uri" not in frame.columns or not labels:
        return _empty()
    return _sorted([_differing(frame.filter(pl.col("uri").is_not_null()), "uri", labels)])


def odd_identifiers(frame: pl.DataFrame) -> pl.DataFrame:
    """Sample ids without plate and well, and BINs not of the form BOLD:AAA0000; one row each."""
    found = []
    for column, pattern, text in (
        ("sampleid", SAMPLE_ID.pattern, "no plate and well in it"),
        ("uri", BIN_URI.pattern, "not of the form BOLD:AAA0000"),
    ):
        if column in frame.columns:
            simple = pattern.replace("?P<plate>", "").replace("?P<well>", "")
            odd = frame.filter(~pl.col(column).str.contains(simple))[column]
            if odd.len():
                detail = f"{text}, for example {', '.join(odd.head(3).to_list())}"
                found.append(pl.DataFrame({"subject": [column], "rows": [odd.len()], "detail": [detail]}))
    return _sorted(found)


CHECKS: Final[dict[str, Callable[[pl.DataFrame], pl.DataFrame]]] = {
    "duplicate_keys": duplicate_keys,
    "parent_conflicts": parent_conflicts,
    "homonyms": homonyms,
    "holes": holes,
    "species_without_genus": species_without_genus,
    "placeholder_names": placeholder_names,
    "duplicate_barcodes": duplicate_barcodes,
    "shared_barcodes": shared_barcodes,
    "bins_across_taxa": bins_across_taxa,
    "odd_identifiers": odd_identifiers,
}
"""Check -> function from catalogue columns to `subject`, `rows`, `detail`."""

NEEDS: Final = {
    "species_without_genus": "species",
    "duplicate_barcodes": "nucraw",
    "shared_barcodes": "nucraw",
    "bins_across_taxa": "uri",
}
"""Check -> column without which it says nothing."""


def listed(frame: pl.DataFrame, keys: Iterable[str]) -> pl.DataFrame:
    """Specimens on a list of low-quality images; one row."""
    rows = frame.filter(pl.col("sampleid").is_in(list(keys)))["sampleid"]
    if rows.is_empty():
        return _empty()
    detail = f"for example {', '.join(rows.head(3).to_list())}"
    return pl.DataFrame({"subject": ["on the list"], "rows": [rows.len()], "detail": [detail]})


def image_differences(frame: pl.DataFrame, found_N: pl.Series, surplus: pl.Series) -> pl.DataFrame:
    """Pictures that rows name and the package has not, and the reverse.

    Args:
        frame: With `image_file`.
        found_N: Row of each in the package, -1 where it is not there.
        surplus: Names in the package that no row has.
    """
    missing = frame.filter((found_N < 0) & frame["image_file"].is_not_null())["image_file"]
    made = [
        pl.DataFrame(
            {
                "subject": [what],
                "rows": [n.len()],
                "detail": [f"for example {', '.join(n.head(3).to_list())}"],
            }
        )
        for what, n in (("missing from the package", missing), ("in no row", surplus))
        if n.len()
    ]
    return _sorted(made)


# -- mending


def mend(frame: pl.DataFrame, steps: Iterable[str]) -> tuple[pl.DataFrame, dict[str, int]]:
    """The table after the named steps, in the order given, and how many rows each changed or dropped.

    Raises:
        RequestError: an unknown step, or none.
    """
    names = list(steps)
    if not names:
        raise RequestError(f"name at least one step of {', '.join(STEPS)}")
    counts = {}
    for name in names:
        if name not in STEPS:
            raise unknown("step", name, STEPS)
        frame, counts[name] = STEPS[name](frame)
    return frame, counts


Mended = tuple[pl.DataFrame, int]


def fill_genus(frame: pl.DataFrame) -> Mended:
    """Genus = first word of the species, where the genus is missing and the species is a binomial."""
    if not {"genus", "species"} <= set(frame.columns):
        return frame, 0
    wanted = pl.col("genus").is_null() & pl.col("species").is_not_null() & ~_placeholder("species")
    changed = frame.select(wanted.sum()).item()
    first = pl.col("species").str.extract(r"^(\S+)")
    return frame.with_columns(pl.when(wanted).then(first).otherwise("genus").alias("genus")), int(changed)


def fill_holes(frame: pl.DataFrame) -> Mended:
    """Missing ranks above a known one, filled where every other record of the taxon agrees.

    Repeated until nothing is left to fill: a path that was filled may leave another with one taxon that fits.
    """
    ranks = [r for r in RANKS if r in frame.columns]
    if not ranks:
        return frame, 0
    made = frame
    while not (filled := _filled_once(made, ranks)).equals(made):
        made = filled
    return _counted(frame, made)


def _filled_once(frame: pl.DataFrame, ranks: Sequence[str]) -> pl.DataFrame:
    paths = frame.select(ranks).unique(maintain_order=True)
    written = [aligned(row, ranks) for row in paths.iter_rows()]
    taxa = resolve_paths(written)
    new = [taxa[path] for path in written]
    filled = paths.with_columns(
        pl.Series(
            f"new {rank}", [path[place] if place < len(path) else None for path in new], dtype=pl.String
        )
        for rank, place in zip(ranks, map(RANKS.index, ranks), strict=True)
    )
    joined = frame.join(filled, on=ranks, how="left", nulls_equal=True, maintain_order="left")
    made = joined.with_columns(pl.col(f"new {rank}").alias(rank) for rank in ranks)
    return made.drop([f"new {rank}" for rank in ranks])


def majority_parents(frame: pl.DataFrame) -> Mended:
    """Names with different parents in one order get the parent of more than half of their records, rank by
    rank from the top; what has no such majority stays.
    """
    ranks = [r for r in RANKS if r in frame.columns]
    made = frame
    for rank in (r for r in _BELOW_ORDER if r in ranks):
        for parent in (r for r in ranks[: ranks.index(rank)] if r in _BELOW_ORDER):
            keys = [r for r in ("order", rank) if r in ranks]
            both = made.filter(pl.col(rank).is_not_null() & pl.col(parent).is_not_null())
            counted = both.group_by([*keys, parent]).len("n")
            ranked = counted.with_columns(
                pl.col("n").sum().over(keys).alias("all"), pl.len().over(keys).alias("parents")
            )
            winners = ranked.filter((pl.col("parents") > 1) & (2 * pl.col("n") > pl.col("all")))
            winners = winners.select(*keys, pl.col(parent).alias("winner"))
            joined = made.join(winners, on=keys, how="left", nulls_equal=True, maintain_order="left")
            wrong = pl.col("winner").is_not_null() & pl.col(parent).is_not_null()
            made = joined.with_columns(pl.when(wrong).then("winner").otherwise(parent).alias(parent))
            made = made.drop("winner")
    return _counted(frame, made)


def drop_placeholders(frame: pl.DataFrame) -> Mended:
    """Interim genus, species and subspecies names become missing; the rows stay."""
    ranks = [r for r in _OFTEN_INTERIM if r in frame.columns]
    cleared = (pl.when(_placeholder(r)).then(None).otherwise(r).alias(r) for r in ranks)
    return _counted(frame, frame.with_columns(cleared))


def drop_duplicate_keys(frame: pl.DataFrame) -> Mended:
    """Of rows with the same sample id (or image file, where there is none) the first is kept."""
    key = "sampleid" if "sampleid" in frame.columns else "image_file"
    kept = frame.unique(key, keep="first", maintain_order=True)
    return kept, frame.height - kept.height


STEPS: Final[dict[str, Callable[[pl.DataFrame], Mended]]] = {
    "fill_genus": fill_genus,
    "fill_holes": fill_holes,
    "majority_parents": majority_parents,
    "drop_placeholders": drop_placeholders,
    "drop_duplicate_keys": drop_duplicate_keys,
}
"""Step -> function to the changed table and the number of rows changed or dropped."""


# -- parts


def barcode_key() -> pl.Expr:
    """The barcode as it is compared: upper case, cut at base 660, N and gaps stripped from the ends."""
    return pl.col("nucraw").str.to_uppercase().str.head(BARCODE_CUT).str.strip_chars("N-")


def _placeholder(rank: str) -> pl.Expr:
    return pl.col(rank).str.contains(PLACEHOLDER_PATTERN).fill_null(False)


def _paths(frame: pl.DataFrame) -> pl.DataFrame:
    """Distinct paths and their number of records, column `len`."""
    ranks = [r for r in RANKS if r in frame.columns]
    return frame.group_by(ranks, maintain_order=True).len() if ranks else frame.select(pl.len())


def _conflicts(frame: pl.DataFrame, *, same_order: bool) -> pl.DataFrame:
    """Names at a rank that have several names at a rank above, in one order or across orders."""
    paths = _paths(frame)
    ranks = [r for r in RANKS if r in frame.columns]
    found = []
    for rank in (r for r in ranks if r in _BELOW_ORDER):
        above = ranks[: ranks.index(rank)]
        if same_order:
            parents = [r for r in above if r in _BELOW_ORDER]
            keys = [rank, *(["order"] if "order" in above else [])]
        else:
            parents, keys = [r for r in above if r not in _BELOW_ORDER], [rank]
        for parent in parents:
            both = paths.filter(pl.col(rank).is_not_null() & pl.col(parent).is_not_null())
            counted = both.group_by([*keys, parent], maintain_order=True).agg(pl.col("len").sum().alias("n"))
            counted = counted.sort("n", parent, descending=[True, False])
            text = pl.concat_str(parent, pl.lit(" "), pl.col("n"))
            grouped = counted.group_by(keys, maintain_order=True).agg(
                pl.col("n").sum().alias("rows"), text.alias("parents"), pl.len().alias("different")
            )
            several = grouped.filter(pl.col("different") > 1)
            detail = pl.lit(f"{rank} in {parent} ") + _first_names(pl.col("parents"), ", ")
            found.append(several.select(pl.col(rank).alias("subject"), "rows", detail.alias("detail")))
    return _sorted(found)


def _differing(frame: pl.DataFrame, key: str, labels: Sequence[str]) -> pl.DataFrame:
    """Values of `key` whose rows have different names in one of the label columns."""
    different = frame.group_by(key).agg((pl.col(c).min() != pl.col(c).max()).alias(c) for c in labels)
    several = different.filter(pl.any_horizontal(labels)).select(key)
    groups = frame.join(several, on=key, how="semi").group_by(key)
    listed_names = groups.agg(
        pl.len().alias("rows"), *(pl.col(label).drop_nulls().unique().sort() for label in labels)
    )
    texts = [
        pl.when(pl.col(c).list.len() > 1).then(f"{c}: " + _first_names(pl.col(c), " / ")) for c in labels
    ]
    detail = pl.concat_str(texts, separator="; ", ignore_nulls=True)
    return listed_names.select(pl.col(key).alias("subject"), "rows", detail.alias("detail"))


def _first_names(names: pl.Expr, between: str) -> pl.Expr:
    """A list of names as text, cut short where it is long."""
    more = pl.when(names.list.len() > 5).then(pl.lit(f"{between}…")).otherwise(pl.lit(""))
    return names.list.head(5).list.join(between) + more


def _counted(old: pl.DataFrame, new: pl.DataFrame) -> Mended:
    """The new table, and how many of its rows have another name at some rank."""
    ranks = [r for r in RANKS if r in old.columns]
    if not ranks:
        return new, 0
    both = new.select(ranks).hstack(old.select(pl.col(r).alias(f"old {r}") for r in ranks))
    differs = pl.any_horizontal(pl.col(r).ne_missing(pl.col(f"old {r}")) for r in ranks)
    return new, int(both.select(differs.sum()).item())


def _sorted(found: list[pl.DataFrame]) -> pl.DataFrame:
    """Most rows first, then by name: the order of the metadata's rows does not matter."""
    rows = [f.select("subject", pl.col("rows").cast(pl.Int64), "detail") for f in found]
    if not rows:
        return _empty()
    return pl.concat(rows).sort(
        "rows", "subject", "detail", descending=[True, False, False], maintain_order=True
    )


def _empty() -> pl.DataFrame:
    return pl.DataFrame(schema=FINDING)


def _empty_names() -> pl.DataFrame:
    return pl.DataFrame(schema={"subject": pl.String, "rows": pl.UInt32, "rank": pl.String})
