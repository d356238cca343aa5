"""What the reader of an evaluation should believe, in three sentences made from its numbers."""

import math
from typing import Final

import numpy as np
import polars as pl

from bioscan.analysis.intervals import wilson
from bioscan.jobs.evaluate import Evaluation
from bioscan.jobs.evaluate_hierarchy import Hierarchy

RISK: Final = 0.05
"""Share of wrong names that the second sentence asks about."""
NEAR: Final = 0.03
"""Calibration error that is no matter: a probability of 0.9 that stands for 0.87 to 0.93."""
FEW: Final = 5
"""A taxon of fewer specimens says nothing by itself: its interval spans half of what is possible."""
SMALL: Final = 30
"""Fewer specimens in all than this are said to be few."""
LITTLE: Final = 0.01
"""A smaller share of answers that may be kept is as good as none."""
CLAUSES: Final = 3
"""Limits named in the third sentence, the gravest ones."""


def beliefs(found: Evaluation, hierarchy: Hierarchy | None = None) -> list[str]:
    """How often the answers are right; how far their probabilities can be trusted; what remains unknown.

    Args:
        found: The evaluation at the rank that matters.
        hierarchy: Of the same predictions; where they back off, the second sentence says what that gained.
    """
    return [_how_often(found), _how_sure(found, hierarchy), _limits(found)]


def _how_often(found: Evaluation) -> str:
    micro, macro = found.metrics["top_1"]["micro"], found.metrics["top_1"]["macro"]
    one = found.n == 1
    of = f"Only {found.n:,} specimen{'' if one else 's'}" if found.n < SMALL else f"Of {found.n:,} specimens"
    checked = f" {'was' if one else 'were'} checked:" if found.n < SMALL else ","
    told = (
        f"{of}{checked} {_percent(micro.value, found.n)} got the right name at rank {found.rank} "
        f"({_range(micro.low, micro.high, found.n)} with 95 % confidence)"
    )
    if macro.classes == 1:
        return f"{told}; they are all of one taxon, so that nothing shows how well taxa are told apart."
    return (
        f"{told}; with each of the {macro.classes:,} taxa counting alike, rare as common, it is "
        f"{_percent(macro.value, found.n)} ({_range(macro.low, macro.high, found.n)})."
    )


def _how_sure(found: Evaluation, hierarchy: Hierarchy | None) -> str:
    told = found.confidence
    if told is None:
        return (
            "The answers came without probabilities, so that nothing tells the sure ones from the doubtful."
        )
    said, right = told.mean, told.accuracy
    low, high = wilson(round(right * told.answered), told.answered)
    pair = f"they say {_percent(said)} on average where {_percent(right)} are right"
    points = f"{100 * told.ece:.1f} percentage points"
    chance = _chance_error(told.reliability)
    if said > high and said - right > NEAR / 2:
        trust = f"The probabilities promise too much: {pair}"
    elif said < low and right - said > NEAR / 2:
        trust = f"The probabilities are too modest: {pair}"
    elif told.ece > max(NEAR, 2 * chance):
        trust = f"The probabilities are right on average but not one by one: they are off by {points}"
    elif told.ece > NEAR:
        trust = (
            f"The probabilities are off by {points}, about what chance makes of so few specimens: "
            "nothing speaks against them"
        )
    else:
        trust = f"The probabilities can be taken at their word: they are off by {points} on average"
    return f"{trust}; {_stopped(found, hierarchy) or _kept(found)}."


def _chance_error(bins: pl.DataFrame) -> float:
    """The calibration error that a perfectly calibrated model would show with as many specimens.

    A bin's share of right answers is off by √(2 p (1 - p) / (π n)) on average: the mean absolute deviation of
    a normal distribution with the variance of a proportion.
    """
    n, p = bins["n"].to_numpy().astype(np.float64), bins["confidence"].to_numpy()
    return float((n * np.sqrt(2 * p * (1 - p) / (np.pi * n))).sum() / n.sum())


def _stopped(found: Evaluation, hierarchy: Hierarchy | None) -> str:
    """What is left of the names at the rank where the predictions back off as asked; "" where they do not."""
    if hierarchy is None or (hierarchy.max_error is None and hierarchy.min_precision is None):
        return ""
    rows = hierarchy.assigned.filter(pl.col("rank") == found.rank).to_dicts()
    if not rows or not rows[0]["named"]:
        return f"as asked, answers stop where they are unsure, and none goes down to rank {found.rank}"
    row = rows[0]
    left = f"{_percent(row['coverage'], row['labelled'])} keep a name at rank {found.rank}"
    among = _percent(row["error_among_named"], row["named"])
    if hierarchy.max_error is None:
        asked = f"at least {100 * (hierarchy.min_precision or 0):g} % right of each name"
        return f"where answers stop when unsure, {left}, {among} of them a wrong one (asked: {asked})"
    if hierarchy.promises_answers:
        right = hierarchy.assigned_metrics["correct_or_ancestor"]
        over, low = _percent(1 - right.value, right.n), 1 - right.high
        told = f"{over} of all answers hold a wrong name"
    else:
        over, low = _percent(row["error_over_all"], row["labelled"]), row["over_all_low"]
        told = f"{over} of all get a wrong one, which is {among} of the named"
    asked = f"at most {100 * hierarchy.max_error:g} % of all"
    if low > hierarchy.max_error:
        asked += ", which these specimens do not keep"
    return f"where answers stop when unsure, {left}; {told} (asked: {asked})"


def _kept(found: Evaluation) -> str:
    """What is left when only the surest answers are kept."""
    assert found.confidence is not None, "there are probabilities"
    most = f"{100 * RISK:g} %"
    coverage = found.confidence.coverage_at[RISK]
    if coverage >= 1:
        return f"all answers kept, no more than {most} are wrong"
    probabilities = found.specimens["probability"].sort(descending=True, nulls_last=True)
    kept = round(coverage * probabilities.len())
    if not kept:
        return f"however few of the surest answers are kept, more than {most} of them are wrong"
    if coverage < LITTLE:
        return f"less than {100 * LITTLE:g} % of the answers, the surest, keep to no more than {most} wrong"
    return (
        f"of the surest {_percent(coverage, found.n)} (a probability of {_least(probabilities[kept - 1])} "
        f"or more) no more than {most} are wrong here"
    )


def _least(probability: float) -> str:
    """A threshold rounded up, so that whoever asks for it keeps no answers more."""
    digits = 3 if probability <= 0.999 else 6
    return f"{math.ceil(probability * 10**digits) / 10**digits:.{digits}f}"


def _limits(found: Evaluation) -> str:
    clauses = []
    if found.same_split is False:
        clauses.append("the model may have been trained on some of these specimens, which would flatter it")
    if unknown := found.counts.get("unknown_to_model"):
        clauses.append(f"the model never learnt the taxa of {unknown:,} of them and gets all of these wrong")
    clauses += _rare(found)
    there = found.per_class.filter(pl.col("support") > 0)
    few, taxa = there.filter(pl.col("support") < FEW).height, there.height
    if few == taxa:
        clauses.append(f"no taxon has {FEW} specimens here to judge it by")
    elif few:
        have = "has" if few == 1 else "have"
        clauses.append(f"{few:,} of the {taxa:,} taxa {have} fewer than {FEW} specimens here")
    if absent := found.per_class.height - taxa:
        which = "taxon that it may answer was" if absent == 1 else "taxa that it may answer were"
        clauses.append(f"{absent:,} more {which} not tested")
    told = "; ".join(clauses[:CLAUSES])
    like = "All of this holds for specimens like these, not for other places, cameras or taxa"
    return f"{like}; {told}." if told else f"{like}."


def _rare(found: Evaluation) -> list[str]:
    """How taxa with few training specimens come out beside those with many."""
    by = {row["bucket"]: row for row in found.buckets.filter(pl.col("specimens") > 0).to_dicts()}
    few, many = by.get("few"), by.get("many") or by.get("medium")
    if few is None or many is None:
        return []
    return [
        f"taxa with few training specimens are named right in {_percent(few['macro'], few['specimens'])} of "
        f"cases, those with {'many' if 'many' in by else 'more'} in "
        f"{_percent(many['macro'], many['specimens'])}"
    ]


def _percent(share: float, n: int = 1000) -> str:
    """Of few specimens without a decimal: it would say nothing."""
    return f"{100 * share:.{0 if n < 100 else 1}f} %"


def _range(low: float, high: float, n: int) -> str:
    return f"{_percent(low, n).removesuffix(' %')}–{_percent(high, n)}"
