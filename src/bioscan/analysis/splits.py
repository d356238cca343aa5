"""Train, validation and test roles by the rule of the paper's program, seeded, all six experiments at once.

The rule, in the program's own order. It shuffled without a seed; the shuffle here is Python's `random`, per
class in rank order, so that equal seeds give equal roles.

1. Classes are ranked by descending count, ties by first appearance.
2. `large_diptera_family`: the most populous families of the order Diptera, each split by 4.
3. `large_insect_order`: specimens with a role in 2 keep it; all others are grouped by order and split by 4.
4. A class of n: n <= 2 is left out; n <= 5 gives 1 test, 1 validation, the rest train; else 70/10/20 %
   rounded half to even, and what is missing or too many goes to train. Train is the head of the shuffled
   class, test its tail.
5. `medium_*`, `small_*`: from each role of the large split water is filled in: rare classes whole, the others
   cut at an equal number, in file order; what is too many is taken from the tail of the most populous class.

So a specimen has one role in all sizes of an experiment, and small lies in medium and medium in large, except
perhaps for the most populous class of a role, which pays for the overshoot of each size separately. The large
splits' counts per class do not depend on the order of the rows; who is in them does.
"""

import hashlib
import random
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bioscan.errors import RequestError, unknown
from bioscan.vocabulary import EXPERIMENTS, NO_SPLIT, ROLES

SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}
FAMILIES = 40
BUDGETS = {"medium": 200_000, "small": 50_000}

_CODES = {role: number for number, role in enumerate((NO_SPLIT, *ROLES))}
Roles = NDArray[np.int8]
"""Per specimen: 0 no_split, 1 train, 2 validation, 3 test."""
Codes = NDArray[np.int64]
"""Per specimen its class number; -1: none."""


@dataclass(frozen=True)
class Splits:
    """Roles of every specimen in each experiment that could be made."""

    roles: pl.DataFrame
    """One String column per experiment, rows as in the metadata."""
    skipped: dict[str, str]
    """Experiment -> why it was not made."""
    settings: dict[str, Any]
    """What the split follows from: rule, seed, families, budgets."""


def make_splits(
    frame: pl.DataFrame,
    *,
    seed: int = 1,
    families: int = FAMILIES,
    medium: int = BUDGETS["medium"],
    small: int = BUDGETS["small"],
    experiments: Collection[str] | None = None,
) -> Splits:
    """Roles by the paper's rule.

    Args:
        frame: Columns `order` and `family`, in metadata order; missing null.
        seed: Seeds Python's `random` before each of the two large splits.
        families: How many Diptera families take part.
        medium: Specimens of the medium experiments, all roles together.
        small: The same of the small ones.
        experiments: Names to make; None makes all and leaves out, with the reason, what the data cannot fill.

    Raises:
        RequestError: an unknown experiment, a number below one, small experiments larger than the medium
        ones, or a named experiment that the data cannot fill.
    """
    for what, number in (("families", families), ("medium", medium), ("small", small)):
        if number < 1:
            raise RequestError(f"{what} is {number}; at least 1 is needed")
    for name in experiments or ():
        if name not in EXPERIMENTS:
            raise unknown("experiment", name, EXPERIMENTS)
    for column in ("order", "family"):
        if column not in frame.columns:
            raise RequestError(f"the split needs column '{column}'")
    budgets = {"medium": medium, "small": small}
    if small > medium and {EXPERIMENTS[name].size for name in experiments or EXPERIMENTS} >= {*budgets}:
        raise RequestError(f"small is {small:,} and medium {medium:,}; small must not be larger")
    large = _large_splits(frame, seed, families)
    columns: dict[str, pl.Series] = {}
    skipped: dict[str, str] = {}
    for experiment in EXPERIMENTS.values():
        if experiments is not None and experiment.name not in experiments:
            continue
        roles, reason = large[experiment.rank], None
        if not roles.any():
            reason = f"no {experiment.rank} has the three specimens that a split needs"
        elif experiment.size != "large":
            roles, reason = _subset(_codes(frame[experiment.rank]), roles, budgets[experiment.size])
        if reason is None:
            columns[experiment.name] = _named(roles)
        elif experiments is not None:
            raise RequestError(f"{experiment.name}: {reason}")
        else:
            skipped[experiment.name] = reason
    settings = {"rule": "paper", "seed": seed, "families": families, "medium": medium, "small": small}
    return Splits(pl.DataFrame(columns), skipped, settings)


def split_hash(keys: pl.Series, roles: pl.Series) -> str:
    """SHA-256 of who has which role: lines `key<TAB>role` sorted by key, `no_split` and missing left out."""
    table = pl.DataFrame({"key": keys, "role": roles.cast(pl.String)})
    table = table.filter(pl.col("role").is_not_null() & (pl.col("role") != NO_SPLIT)).sort("key")
    lines = table.select(pl.concat_str("key", pl.lit("\t"), "role", pl.lit("\n")).str.join("")).item()
    return hashlib.sha256(lines.encode()).hexdigest()


def role_counts(labels: pl.Series, roles: pl.Series) -> pl.DataFrame:
    """Class by role: columns `taxon`, `train`, `validation`, `test`, `total`; most populous first."""
    table = pl.DataFrame({"taxon": labels, "role": roles.cast(pl.String)})
    table = table.filter(pl.col("role").is_in(ROLES) & pl.col("taxon").is_not_null())
    counted = table.group_by("taxon", maintain_order=True).agg(
        *((pl.col("role") == role).sum().cast(pl.Int64).alias(role) for role in ROLES),
        pl.len().cast(pl.Int64).alias("total"),
    )
    return counted.sort("total", descending=True, maintain_order=True)


def _large_splits(frame: pl.DataFrame, seed: int, families: int) -> dict[str, Roles]:
    in_order = next(e.within for e in EXPERIMENTS.values() if e.rank == "family")
    of_diptera = (frame["order"].cast(pl.String) == in_order).fill_null(False).to_numpy()
    family_codes = _ranked(np.where(of_diptera, _codes(frame["family"]), -1))
    family_roles = _split_classes(np.where(family_codes < families, family_codes, -1), seed)
    free_codes = _ranked(np.where(family_roles == 0, _codes(frame["order"]), -1))
    order_roles = np.where(family_roles > 0, family_roles, _split_classes(free_codes, seed))
    return {"family": family_roles, "order": order_roles}


def _codes(labels: pl.Series) -> Codes:
    """Class number of each row by first appearance; -1: missing."""
    names = labels.drop_nulls().cast(pl.String).unique(maintain_order=True)
    return labels.cast(pl.Enum(names)).to_physical().cast(pl.Int64).fill_null(-1).to_numpy()


def _ranked(codes: Codes) -> Codes:
    """Classes renumbered by descending count among these rows, ties by first appearance; -1 stays."""
    known = codes[codes >= 0]
    counts = np.bincount(known)
    first = np.empty(counts.size, np.int64)
    first[known[::-1]] = np.arange(known.size)[::-1]  # of several values for one place the last stays
    present = np.flatnonzero(counts)
    number = np.full(counts.size + 1, -1)  # the last place answers code -1
    number[present[np.lexsort((first[present], -counts[present]))]] = np.arange(present.size)
    return number[codes]


def _rows_of_classes(codes: Codes) -> list[NDArray[np.int64]]:
    """Row numbers of class 0, 1, …, each in file order."""
    counts = np.bincount(codes[codes >= 0])
    # numpy sorts 16-bit numbers by radix, ten times as fast
    order = np.argsort(codes.astype(np.int16) if counts.size < 2**15 else codes, kind="stable")
    return np.split(order[codes.size - counts.sum() :], np.cumsum(counts)[:-1]) if counts.size else []


def _split_classes(codes: Codes, seed: int) -> Roles:
    """Rule 4 for every class, in rank order, with one stream of Python's `random`."""
    generator = random.Random(seed)  # noqa: S311
    roles = np.zeros(codes.size, np.int8)
    for members in _rows_of_classes(codes):
        places = list(range(members.size))
        generator.shuffle(places)
        rows = members[places]
        train, validation, test = class_sizes(rows.size)
        if rows.size < 6:  # the small classes are dealt from the other end: test first, then validation
            rows = np.concatenate([rows[2:], rows[1::-1]])
        roles[rows[:train]] = _CODES["train"]
        roles[rows[train : train + validation]] = _CODES["validation"]
        roles[rows[rows.size - test :]] = _CODES["test"]
    return roles


def class_sizes(n: int) -> tuple[int, int, int]:
    """How many of a class of n go to train, validation and test (rule 4).

    >>> class_sizes(2), class_sizes(5), class_sizes(96)
    ((0, 0, 0), (3, 1, 1), (67, 10, 19))
    """
    if n <= 2:
        return 0, 0, 0
    if n <= 5:
        return n - 2, 1, 1
    train, validation, test = (round(n * share) for share in SHARES.values())
    return train + n - (train + validation + test), validation, test


def _subset(codes: Codes, roles: Roles, budget: int) -> tuple[Roles, str | None]:
    """Rule 5; the second value says why it cannot be met, else None."""
    chosen = np.zeros_like(roles)
    for role, share in SHARES.items():
        target = int(share * budget)
        rows = np.flatnonzero(roles == _CODES[role])
        if target > rows.size:
            reason = f"{budget:,} specimens ask for {target:,} in {role}, the large split has {rows.size:,}"
            return chosen, reason
        chosen[rows[_water_filled(codes[rows], target)]] = _CODES[role]
    return chosen, None


def _water_filled(codes: Codes, target: int) -> NDArray[np.int64]:
    """Places of the chosen rows: at most `level` of each class, the lowest level that reaches the target."""
    if target == 0:
        return np.zeros(0, np.int64)
    classes = _rows_of_classes(_ranked(codes))
    counts = np.array([len(rows) for rows in classes])
    held = _filled(counts)
    level = int(np.searchsorted(held, target)) + 1
    taken = [rows[:level] for rows in classes]
    surplus = int(held[level - 1]) - target
    if surplus:  # more than the class holds empties it and no other, as in the paper's program
        taken[0] = taken[0][: max(0, len(taken[0]) - surplus)]
    return np.concatenate(taken)


def _filled(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many rows each level 1, 2, … holds: sum over classes of min(count, level)."""
    reach = np.bincount(counts, minlength=int(counts.max()) + 1)
    return np.cumsum(counts.size - np.cumsum(reach)[:-1])


def _named(roles: Roles) -> pl.Series:
    return pl.Series((NO_SPLIT, *ROLES)).gather(roles)
