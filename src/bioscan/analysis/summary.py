"""Statistics of a dataset: taxa, classes, BINs, barcodes and plates; whole, and per experiment and role.

How taxa are counted: a taxon is its path, not its name (`analysis.taxonomy`). One genus name in two orders
makes two taxa; a path with a hole joins the one taxon that it fits. `names` says how many different names
there are, which is what the paper counts. A specimen is labelled at a rank when its own row names that rank.

The table is grouped once by its rank and split columns and once by BIN and split columns; every number is
then worked out from the groups.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bioscan.analysis.taxonomy import resolve_paths
from bioscan.errors import unknown
from bioscan.vocabulary import BARCODE_CUT, BARCODE_LENGTH, EXPERIMENTS, RANKS, ROLES, SAMPLE_ID

BIN: Final = "bin"
"""Stands in column `rank` for the BINs (`uri`), which are no rank."""
TOTAL: Final = "total"
"""Stands in column `role` for train, validation and test together."""
PARTS: Final = ("barcodes", "plates")
"""What `summarise` may leave out: it reads whole sequences and ids, and takes longest."""

MANY_ABOVE: Final = 100
FEW_BELOW: Final = 20
"""A class of more than 100 specimens is of many, one of fewer than 20 of few, the others of medium shot
(Liu et al. 2019, "Large-scale long-tailed recognition in an open world")."""

QUANTILES: Final = (0.05, 0.25, 0.5, 0.75, 0.95)

_LEVEL: Final = {
    "rank": pl.String(),
    "specimens": pl.Int64(),
    "labelled": pl.Int64(),
    "unlabelled": pl.Int64(),
    "labelled_share": pl.Float64(),
    "taxa": pl.Int64(),
    "names": pl.Int64(),
    "largest": pl.Int64(),
    "largest_taxon": pl.String(),
    "smallest": pl.Int64(),
    "smallest_taxon": pl.String(),
    "imbalance": pl.Float64(),
    "median": pl.Float64(),
    "singletons": pl.Int64(),
    "many": pl.Int64(),
    "medium": pl.Int64(),
    "few": pl.Int64(),
}
_TAXA: Final = {
    "rank": pl.String(),
    "taxon": pl.String(),
    "path": pl.String(),
    "specimens": pl.Int64(),
    "share_of_labelled": pl.Float64(),
    "share": pl.Float64(),
}
_CLASSES: Final = {
    "experiment": pl.String(),
    "taxon": pl.String(),
    "path": pl.String(),
    **dict.fromkeys((*ROLES, TOTAL), pl.Int64()),
    "share": pl.Float64(),
}


@dataclass(frozen=True, eq=False)
class Distribution:
    """How often each whole number occurs: how many BINs have 1, 2, 3 … specimens, for example."""

    values_V: NDArray[np.int64]
    """The numbers that occur, ascending."""
    counts_V: NDArray[np.int64]
    """How often each does."""

    @classmethod
    def of(cls, numbers: NDArray[np.int64], weights: NDArray[np.int64] | None = None) -> "Distribution":
        """The distribution of some numbers, each counted once or `weights` times."""
        values, inverse = np.unique(numbers, return_inverse=True)
        counts = np.zeros(values.size, np.int64)
        np.add.at(counts, inverse, 1 if weights is None else weights)
        return cls(values.astype(np.int64), counts)

    @property
    def size(self) -> int:
        """How many numbers there are, repeated ones included."""
        return int(self.counts_V.sum())

    @property
    def total(self) -> int:
        """Their sum."""
        return int(self.values_V @ self.counts_V)

    @property
    def mean(self) -> float | None:
        """Arithmetic mean; None of nothing."""
        return self.total / self.size if self.size else None

    def quantile(self, share: float) -> int | None:
        """The least number that at least this share of all do not exceed; None of nothing."""
        if not self.size:
            return None
        reached = int(np.searchsorted(np.cumsum(self.counts_V), share * self.size - 1e-9))
        return int(self.values_V[min(reached, self.values_V.size - 1)])

    def count(self, least: int, most: int | None = None) -> int:
        """How many numbers are `least` or more, and `most` or less."""
        chosen = self.values_V >= least
        if most is not None:
            chosen &= self.values_V <= most
        return int(self.counts_V[chosen].sum())

    def to_dict(self) -> dict[str, Any]:
        """For JSON: size, total, mean, min, quantiles, max, and `histogram`, pairs of number and count."""
        return {
            "size": self.size,
            "total": self.total,
            "mean": self.mean,
            "min": self.quantile(0.0),
            "quantiles": {str(q): self.quantile(q) for q in QUANTILES},
            "max": self.quantile(1.0),
            "histogram": [[int(v), int(c)] for v, c in zip(self.values_V, self.counts_V, strict=True)],
        }

    def to_frame(self, value: str, count: str) -> pl.DataFrame:
        """A table of two columns with the given names."""
        return pl.DataFrame({value: self.values_V, count: self.counts_V})


@dataclass(frozen=True, eq=False)
class Barcodes:
    """The `nucraw` column as it stands: junk after the barcode, N and gaps included."""

    present: int
    """Specimens that have a barcode."""
    missing: int
    lengths: Distribution
    """Characters of each."""
    standard: int
    """Barcodes of exactly BARCODE_LENGTH characters."""
    over: int
    """Barcodes of more than BARCODE_CUT characters, whose ends are unreliable."""
    with_n: int
    with_gap: int
    with_other: int
    """Barcodes that hold N, a gap `-`, anything but A, C, G, T, N and gaps; of either case."""
    n_share: float | None
    """Share of N among all characters; None without barcodes."""
    distinct: int
    """Different barcodes, compared whole."""
    shared: int
    """Specimens whose barcode another specimen has too."""
    commonest: int
    """Specimens of the commonest barcode."""
    roles: pl.DataFrame
    """Per experiment and role: `specimens`, `barcodes`, and `min`, `lower_quartile`, `median`,
    `upper_quartile`, `max` of the lengths."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        numbers = {
            name: getattr(self, name)
            for name in (
                *("present", "missing", "standard", "over", "with_n", "with_gap", "with_other"),
                *("n_share", "distinct", "shared", "commonest"),
            )
        }
        return {**numbers, "lengths": self.lengths.to_dict(), "roles": self.roles.to_dicts()}


@dataclass(frozen=True, eq=False)
class Summary:
    """Statistics of a table of specimens. Tables are sorted; the order of the specimens does not matter."""

    specimens: int
    ranks: pl.DataFrame
    """A row per rank that the table has, root down, then BINs (`rank` is `bin`).

    `specimens`, of which `labelled` and `unlabelled`, and `labelled_share`; `taxa` and different `names`;
    specimens of the `largest` and `smallest` taxon, their ratio `imbalance`, and the `median`; `singletons`:
    taxa of one specimen; `many`, `medium` and `few`: taxa by MANY_ABOVE and FEW_BELOW. Null where there is no
    taxon or no specimen.
    """
    taxa: pl.DataFrame
    """A row per taxon, by rank, most specimens first: `rank`, `taxon`, its `path` (names joined by `;`, holes
    empty), `specimens`, `share_of_labelled` (of the rank) and `share` (of all specimens)."""
    experiments: pl.DataFrame
    """The columns of `ranks` per `experiment` and `role` (train, validation, test, total)."""
    classes: pl.DataFrame
    """Classes of each experiment, at its own rank: `experiment`, `taxon`, `path`, specimens in `train`,
    `validation`, `test` and `total`, and `share` (of the experiment's labelled specimens)."""
    bins: Distribution | None
    """Specimens per BIN; None without column `uri`."""
    plates: Distribution | None
    """Specimens per plate, from sample ids of the form plate-well; None if left out or without them."""
    barcodes: Barcodes | None
    """None if left out or without column `nucraw`."""
    absent: dict[str, str]
    """What there are no statistics of -> why."""

    def rank(self, rank: str) -> dict[str, Any]:
        """The row of `ranks` for one rank (or `bin`).

        Raises:
            RequestError: a rank that the table has not.
        """
        rows = self.ranks.filter(pl.col("rank") == rank).to_dicts()
        if not rows:
            raise unknown("rank", rank, self.ranks["rank"])
        return rows[0]

    def taxa_of(self, rank: str) -> pl.DataFrame:
        """The rows of `taxa` for one rank, most specimens first."""
        return self.taxa.filter(pl.col("rank") == rank)

    def classes_of(self, experiment: str) -> pl.DataFrame:
        """The rows of `classes` for one experiment, most specimens first."""
        return self.classes.filter(pl.col("experiment") == experiment)

    def tables(self) -> dict[str, pl.DataFrame]:
        """Every table by name, those of parts that are not there left out."""
        made = {
            "ranks": self.ranks,
            "taxa": self.taxa,
            "experiments": self.experiments,
            "classes": self.classes,
        }
        if self.bins is not None:
            made["bins"] = self.bins.to_frame("specimens", "bins")
        if self.plates is not None:
            made["plates"] = self.plates.to_frame("specimens", "plates")
        if self.barcodes is not None:
            made["barcode_lengths"] = self.barcodes.lengths.to_frame("length", "barcodes")
            made["barcode_lengths_by_role"] = self.barcodes.roles
        return made

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "specimens": self.specimens,
            "ranks": self.ranks.to_dicts(),
            "taxa": self.taxa.to_dicts(),
            "experiments": self.experiments.to_dicts(),
            "classes": self.classes.to_dicts(),
            "bins": self.bins and self.bins.to_dict(),
            "plates": self.plates and self.plates.to_dict(),
            "barcodes": self.barcodes and self.barcodes.to_dict(),
            "absent": self.absent,
        }


def summarise(frame: pl.DataFrame | pl.LazyFrame, *, skip: Collection[str] = ()) -> Summary:
    """Statistics of a table of specimens.

    Args:
        frame: Catalogue columns, missing null; any of them may be absent. Of a lazy table only the columns
            needed are read, and the barcodes are never held in memory.
        skip: Names in PARTS to leave out.

    Raises:
        RequestError: an unknown part.
    """
    for part in skip:
        if part not in PARTS:
            raise unknown("part", part, PARTS)
    lazy = frame.lazy()
    present = lazy.collect_schema().names()
    ranks = [r for r in RANKS if r in present]
    experiments = [e for e in EXPERIMENTS if e in present]
    absent = {c: f"no column '{c}'" for c in (*RANKS, *EXPERIMENTS, "uri") if c not in present}
    if not ranks and "uri" not in present:
        absent |= dict.fromkeys(experiments, "neither taxa nor BINs to count")
    queries = [_grouped(lazy, [*ranks, *experiments])]
    if "uri" in present:
        queries.append(_grouped(lazy, ["uri", *experiments]))
    by_path, *by_bin = pl.collect_all(queries, engine="streaming")
    levels = [*_rank_levels(by_path, ranks, experiments), *(_bin_level(b, experiments) for b in by_bin)]
    plates, barcodes = None, None
    if "plates" in skip:
        absent["plates"] = "left out"
    else:
        plates = _plates(lazy) if "sampleid" in present else None
        if plates is None:
            absent["plates"] = "no sample ids of the form plate-well"
    if "barcodes" in skip:
        absent["barcodes"] = "left out"
    elif "nucraw" in present:
        barcodes = _barcodes(lazy, experiments)
    else:
        absent["barcodes"] = "no column 'nucraw'"
    specimens = int(by_path["n"].sum())
    return Summary(
        specimens=specimens,
        ranks=_frame((level.row(level.counts(), specimens) for level in levels), _LEVEL),
        taxa=_taxa(level for level in levels if level.rank != BIN),
        experiments=_experiments(levels, experiments),
        classes=_classes(levels, experiments),
        bins=Distribution.of(levels[-1].counts()) if by_bin else None,
        plates=plates,
        barcodes=barcodes,
        absent=absent,
    )


class Taxa(NamedTuple):
    """The taxa of one rank."""

    codes_N: NDArray[np.int64]
    """Place of the taxon of each row in the lists below; -1 where the rank is not named."""
    names_K: list[str]
    paths_K: list[str]
    """Names from phylum down, joined by `;`, holes empty; in alphabetical order."""


def taxa_of_paths(paths: pl.DataFrame) -> dict[str, Taxa]:
    """Which taxon each path belongs to, at each rank that the table has.

    The taxa are those of `analysis.taxonomy.resolve_paths`, which is called only for the names whose paths
    contradict each other; all others are worked out on columns.

    Args:
        paths: Rank columns, missing null; repeated rows may be in it.
    """
    columns = [r for r in RANKS if r in paths.columns]
    used = [r for r in columns if paths[r].null_count() < paths.height]
    made: dict[str, Taxa] = dict.fromkeys(columns, Taxa(np.full(paths.height, -1), [], []))
    if not used:
        return made
    # sorted: which of two holes is filled first must not follow from the order of the specimens
    distinct = paths.select(used).unique().sort(used)
    joined = paths.select(used).join(
        distinct.with_row_index("row"), on=used, how="left", nulls_equal=True, maintain_order="left"
    )
    row_N = joined["row"].to_numpy()
    names = [distinct[r].drop_nulls().unique().sort() for r in used]
    codes_RD = np.stack([_codes(distinct[r], n) for r, n in zip(used, names, strict=True)])
    filled_RD, contradicted_D = _filled(codes_RD)
    all_ranks = [pl.col(r) if r in used else pl.lit(None, pl.String).alias(r) for r in RANKS]
    filled = pl.DataFrame(
        {r: _names(n, codes) for r, n, codes in zip(used, names, filled_RD, strict=True)}
    ).select(all_ranks)
    odd = np.flatnonzero(contradicted_D)
    written = distinct[odd].select(all_ranks).rows()
    canonical = resolve_paths(written)
    for rank, codes_D in zip(used, codes_RD, strict=True):
        length = RANKS.index(rank) + 1
        odd_texts = [path_text(canonical[path[:length]]) if path[length - 1] else "" for path in written]
        plain_D = np.where(contradicted_D, -1, codes_D)
        plain = np.flatnonzero(plain_D >= 0)
        codes, first = np.unique(plain_D[plain], return_index=True)
        text = pl.concat_str((pl.col(r).fill_null("") for r in RANKS[:length]), separator=";")
        plain_texts = filled[plain[first]].select(text).to_series().to_list()
        taxa = sorted({*plain_texts, *odd_texts} - {""})
        place = {"": -1} | {taxon: number for number, taxon in enumerate(taxa)}
        place_K = np.full(codes_D.max() + 2, -1)  # the last for code -1
        place_K[codes] = [place[t] for t in plain_texts]
        place_D = place_K[plain_D]
        place_D[odd] = [place[t] for t in odd_texts]
        made[rank] = Taxa(place_D[row_N], [t.rpartition(";")[2] for t in taxa], taxa)
    return made


def _codes(texts: pl.Series, names: pl.Series) -> NDArray[np.int64]:
    """Place of each text among the names, -1 for null."""
    codes = texts.cast(pl.Enum(names)).to_physical().cast(pl.Int64).fill_null(-1)
    return codes.to_numpy()


def _names(names: pl.Series, codes: NDArray[np.int64]) -> pl.Series:
    """The name at each place, null for -1."""
    return names.gather(np.maximum(codes, 0)).zip_with(
        pl.Series(codes >= 0), pl.Series([None], dtype=pl.String)
    )


def path_text(path: Iterable[str | None]) -> str:
    """A lineage as one text: names joined by `;`, holes empty."""
    return ";".join(name or "" for name in path)


def _filled(codes_RD: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Name codes with holes filled by other paths of the same name, and which paths are contradicted.

    A name that has one path only, and a path without holes, fills no hole and has none to be filled: such
    names tie no paths together. All paths that are tied by other names, directly or through further ones, are
    contradicted where two of them differ in the name above a shared name; those are left to the caller.

    Args:
        codes_RD: Per rank and distinct path the code of the name, -1 for a hole.
    """
    num = codes_RD.shape[1]
    tying_RD = np.zeros(codes_RD.shape, bool)
    prefix_D, hole_D = np.zeros(num, np.int64), np.zeros(num, bool)
    for codes, tying in zip(codes_RD, tying_RD, strict=True):
        _, prefix_D = np.unique(prefix_D * (codes.max() + 2) + codes, return_inverse=True)
        named = codes >= 0
        bad_K = np.zeros(codes.max() + 1, bool)
        last_K = np.zeros(codes.max() + 1, np.int64)
        last_K[codes[named]] = prefix_D[named]
        bad_K[codes[named & (hole_D | (last_K[codes] != prefix_D))]] = True
        tying[:] = named & bad_K[codes]
        hole_D |= ~named
    group_D = np.arange(num)
    filled = codes_RD.copy()
    contradicted_D = np.zeros(num, bool)
    while True:
        before = group_D.sum(), (filled < 0).sum()
        for place, (codes, tying) in enumerate(zip(codes_RD, tying_RD, strict=True)):
            rows = np.flatnonzero(tying)
            least_K = np.full(codes.max() + 1, num)
            np.minimum.at(least_K, codes[rows], group_D[rows])
            group_D[rows] = least_K[codes[rows]]
            for above in filled[:place]:
                known = rows[above[rows] >= 0]
                name_K = np.full(codes.max() + 1, -1)
                name_K[codes[known]] = above[known]
                contradicted_D[known[name_K[codes[known]] != above[known]]] = True
                holes = rows[above[rows] < 0]
                above[holes] = name_K[codes[holes]]
        if before == (group_D.sum(), (filled < 0).sum()):
            break
    spoilt_G = np.zeros(num, bool)
    spoilt_G[group_D[contradicted_D]] = True
    return filled, spoilt_G[group_D]


# -- groups


@dataclass(frozen=True, eq=False)
class _Level:
    """One rank, or the BINs, over groups of specimens that agree in it and in their roles."""

    rank: str
    codes_G: NDArray[np.int64]
    """Taxon of each group, -1 where it has none."""
    names_K: Sequence[str]
    paths_K: Sequence[str]
    sizes_G: NDArray[np.int64]
    """Specimens of each group."""
    roles_G: dict[str, NDArray[np.int64]]
    """Experiment -> place in ROLES, -1 where the group has no role."""

    def counts(self) -> NDArray[np.int64]:
        """Specimens of each taxon."""
        named = np.flatnonzero(self.codes_G >= 0)
        return _summed(self.codes_G[named], self.sizes_G[named], len(self.names_K))

    def role_counts(self, experiment: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Specimens by role of each taxon, 3 x K, and all specimens of each role, labelled or not."""
        roles_G, num = self.roles_G[experiment], len(self.names_K)
        chosen = np.flatnonzero(roles_G >= 0)
        codes, roles, sizes = self.codes_G[chosen], roles_G[chosen], self.sizes_G[chosen]
        # those without a name are counted one place after the taxa
        cells = roles * (num + 1) + np.where(codes < 0, num, codes)
        counts = _summed(cells, sizes, len(ROLES) * (num + 1)).reshape(len(ROLES), num + 1)
        return counts[:, :num], counts.sum(axis=1)

    def row(self, counts_K: NDArray[np.int64], specimens: int) -> dict[str, Any]:
        """The columns of _LEVEL for so many specimens of each taxon among all `specimens`."""
        taxa = np.flatnonzero(counts_K)
        counts = counts_K[taxa]
        labelled = int(counts.sum())
        row: dict[str, Any] = {
            "rank": self.rank,
            "specimens": specimens,
            "labelled": labelled,
            "unlabelled": specimens - labelled,
            "labelled_share": labelled / specimens if specimens else None,
            "taxa": taxa.size,
            "names": taxa.size if self._no_homonyms else len({self.names_K[k] for k in taxa.tolist()}),
            "singletons": int((counts == 1).sum()),
            "many": int((counts > MANY_ABOVE).sum()),
            "medium": int(((counts >= FEW_BELOW) & (counts <= MANY_ABOVE)).sum()),
            "few": int((counts < FEW_BELOW).sum()),
        }
        if taxa.size:
            most, least = int(counts.argmax()), int(counts.argmin())
            row |= {
                "largest": int(counts[most]),
                "largest_taxon": self.names_K[int(taxa[most])],
                "smallest": int(counts[least]),
                "smallest_taxon": self.names_K[int(taxa[least])],
                "imbalance": float(counts[most] / counts[least]),
                "median": float(np.median(counts)),
            }
        return row

    @cached_property
    def _no_homonyms(self) -> bool:
        return len(set(self.names_K)) == len(self.names_K)


def _summed(places: NDArray[np.int64], sizes: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    sums = np.bincount(places, sizes, length)
    return sums.astype(np.int64)  # sums of whole numbers in float64 are exact below 2**53


def _grouped(lazy: pl.LazyFrame, columns: Sequence[str]) -> pl.LazyFrame:
    """How many specimens (`n`) agree in all columns."""
    count = pl.len().cast(pl.Int64).alias("n")
    if not columns:
        return lazy.select(count)
    return lazy.select(pl.col(c).cast(pl.String) for c in columns).group_by(columns).agg(count)


def _roles(groups: pl.DataFrame, experiments: Iterable[str]) -> dict[str, NDArray[np.int64]]:
    places = pl.Enum(ROLES)
    return {
        name: groups[name].cast(places, strict=False).to_physical().cast(pl.Int64).fill_null(-1).to_numpy()
        for name in experiments
    }


def _rank_levels(groups: pl.DataFrame, ranks: Sequence[str], experiments: Sequence[str]) -> list[_Level]:
    sizes, roles = groups["n"].to_numpy(), _roles(groups, experiments)
    return [
        _Level(rank, taxa.codes_N, taxa.names_K, taxa.paths_K, sizes, roles)
        for rank, taxa in taxa_of_paths(groups.select(ranks)).items()
    ]


def _bin_level(groups: pl.DataFrame, experiments: Sequence[str]) -> _Level:
    names = groups["uri"].drop_nulls().unique().sort()
    sizes, roles = groups["n"].to_numpy(), _roles(groups, experiments)
    texts = names.to_list()
    return _Level(BIN, _codes(groups["uri"], names), texts, texts, sizes, roles)


def _frame(rows: Iterable[dict[str, Any]], schema: dict[str, Any]) -> pl.DataFrame:
    return pl.DataFrame([{column: row.get(column) for column in schema} for row in rows], schema=schema)


def _experiments(levels: Sequence[_Level], experiments: Sequence[str]) -> pl.DataFrame:
    rows = []
    for name in experiments:
        counted = [(level, *level.role_counts(name)) for level in levels]
        for place, role in enumerate((*ROLES, TOTAL)):
            roles = slice(None) if role == TOTAL else slice(place, place + 1)
            for level, by_taxon, by_role in counted:
                row = level.row(by_taxon[roles].sum(axis=0), int(by_role[roles].sum()))
                rows.append({"experiment": name, "role": role, **row})
    return _frame(rows, {"experiment": pl.String(), "role": pl.String(), **_LEVEL})


def _taxa(levels: Iterable[_Level]) -> pl.DataFrame:
    made = [pl.DataFrame(schema=_TAXA)]
    for level in levels:
        table = pl.DataFrame({"taxon": level.names_K, "path": level.paths_K, "specimens": level.counts()})
        shares = (
            pl.lit(level.rank).alias("rank"),
            (pl.col("specimens") / pl.col("specimens").sum()).alias("share_of_labelled"),
            (pl.col("specimens") / int(level.sizes_G.sum())).alias("share"),
        )
        ordered = table.with_columns(shares).sort("specimens", descending=True, maintain_order=True)
        made.append(ordered.select(pl.col(c).cast(kind) for c, kind in _TAXA.items()))
    return pl.concat(made)


def _classes(levels: Iterable[_Level], experiments: Sequence[str]) -> pl.DataFrame:
    by_rank = {level.rank: level for level in levels}
    made = [pl.DataFrame(schema=_CLASSES)]
    for name in experiments:
        level = by_rank.get(EXPERIMENTS[name].rank)
        if level is None:
            continue
        by_taxon, _ = level.role_counts(name)
        counts = dict(zip(ROLES, by_taxon, strict=True)) | {TOTAL: by_taxon.sum(axis=0)}
        table = pl.DataFrame({"taxon": level.names_K, "path": level.paths_K, **counts})
        table = table.filter(pl.col(TOTAL) > 0).with_columns(
            pl.lit(name).alias("experiment"), (pl.col(TOTAL) / pl.col(TOTAL).sum()).alias("share")
        )
        ordered = table.sort(TOTAL, descending=True, maintain_order=True)
        made.append(ordered.select(pl.col(c).cast(kind) for c, kind in _CLASSES.items()))
    return pl.concat(made)


# -- ids and sequences


def _plates(lazy: pl.LazyFrame) -> Distribution | None:
    plate = pl.col("sampleid").cast(pl.String).str.extract(SAMPLE_ID.pattern, 1).alias("plate")
    sizes = lazy.select(plate).drop_nulls().group_by("plate").len("n").collect(engine="streaming")["n"]
    return Distribution.of(sizes.to_numpy().astype(np.int64)) if sizes.len() else None


def _barcodes(lazy: pl.LazyFrame, experiments: Sequence[str]) -> Barcodes:
    barcode = pl.col("nucraw").cast(pl.String)
    per_specimen = lazy.select(
        barcode.str.len_chars().cast(pl.Int64).alias("length"),
        barcode.str.count_matches("[Nn]").cast(pl.Int64).alias("n"),
        barcode.str.contains("-", literal=True).alias("gap"),
        barcode.str.contains("[^ACGTNacgtn-]").alias("other"),
        # two of 1.1 million barcodes share 64 bits by accident once in 30 million tables
        pl.when(barcode.is_not_null()).then(barcode.hash()).alias("hash"),
        *(pl.col(e).cast(pl.String) for e in experiments),
    )
    made = per_specimen.collect(engine="streaming")
    lengths = made.group_by("length", *experiments).len("n")
    known = made.filter(pl.col("length").is_not_null())
    copies = known.group_by("hash").len("n")["n"].cast(pl.Int64)
    letters = int(known["length"].sum())
    return Barcodes(
        present=known.height,
        missing=made.height - known.height,
        lengths=_lengths(lengths),
        standard=int((known["length"] == BARCODE_LENGTH).sum()),
        over=int((known["length"] > BARCODE_CUT).sum()),
        with_n=int((known["n"] > 0).sum()),
        with_gap=int(known["gap"].sum()),
        with_other=int(known["other"].sum()),
        n_share=int(known["n"].sum()) / letters if letters else None,
        distinct=copies.len(),
        shared=int(copies.filter(copies > 1).sum()),
        commonest=max(copies, default=0),
        roles=_frame(
            (_length_row(lengths, name, role) for name in experiments for role in (*ROLES, TOTAL)),
            {
                **{"experiment": pl.String(), "role": pl.String(), "specimens": pl.Int64()},
                **dict.fromkeys(("barcodes", "min", *_QUARTILES, "max"), pl.Int64()),
            },
        ),
    )


_QUARTILES: Final = {"lower_quartile": 0.25, "median": 0.5, "upper_quartile": 0.75}


def _lengths(groups: pl.DataFrame) -> Distribution:
    known = groups.filter(pl.col("length").is_not_null())
    return Distribution.of(known["length"].to_numpy(), known["n"].cast(pl.Int64).to_numpy())


def _length_row(groups: pl.DataFrame, experiment: str, role: str) -> dict[str, Any]:
    chosen = groups.filter(pl.col(experiment).is_in(ROLES if role == TOTAL else [role]))
    lengths = _lengths(chosen)
    return {
        "experiment": experiment,
        "role": role,
        "specimens": int(chosen["n"].sum()),
        "barcodes": lengths.size,
        "min": lengths.quantile(0.0),
        **{name: lengths.quantile(share) for name, share in _QUARTILES.items()},
        "max": lengths.quantile(1.0),
    }
