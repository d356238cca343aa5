"""Words for an open-set evaluation: its text and its tables."""

from typing import Any

import polars as pl

from bioscan.app.output import table
from bioscan.app.scores import interval
from bioscan.jobs.open_set import ANSWERS, COUNTS, SCORES, OpenSet

SHOWN = 20
"""Unseen taxa that the text lists; the CSV and JSON have all."""

NOTES = (
    "AUROC: chance that an unseen specimen scores as more novel than a seen one, 0.5 for a coin; its 95 % "
    "interval is over other taxa as well as other specimens",
    "FPR@95: share of the seen flagged where 95 % of the unseen are found; missed@95: share of the unseen "
    "missed where 95 % of the seen are kept",
    "OSCR: chance that a seen specimen is named right and scores as less novel than an unseen one",
)


def text(found: OpenSet) -> str:
    """The evaluation for eyes."""
    which = f"{found.experiment}, {found.role}" if found.experiment else "all specimens in both"
    which = f"{which}, within {found.within}" if found.within else which
    parts = [
        f"{which}: {found.seen:,} specimens of {found.seen_taxa:,} seen taxa, {found.unseen:,} of "
        f"{found.unseen_taxa:,} unseen taxa at rank {found.rank}",
        *(f"{found.counts[name]:,} {said}" for name, said in COUNTS.items() if found.counts.get(name)),
    ]
    if found.same_split is False:
        parts.append(
            "the roles are not those that the model was trained with (the split's hash differs): specimens "
            "that count here may have been trained on"
        )
    if found.homonyms:
        parts.append(f"told apart by the ranks above: {', '.join(found.homonyms)}")
    parts += ["", *_scores(found), "", *_ranks(found)]
    return "\n".join([*parts, "", *_named_above(found), "", _taxa(found)])


def csv_tables(found: OpenSet) -> dict[str, pl.DataFrame]:
    """File name without ending -> table."""
    return {
        "novelty": found.scores,
        "novelty_curves": found.curves,
        "seen_unseen": found.ranks,
        "unseen_taxa": found.taxa,
        "unseen_specimens": found.specimens.filter("unseen").drop("unseen"),
    }


def _scores(found: OpenSet) -> list[str]:
    """How well each score tells unseen from seen, and what each is."""
    above = [f"flagged, {found.above} right"] if found.above else []
    header = ["score", "AUROC", "95 %", "AUPR unseen", "AUPR seen", "FPR@95", "missed@95", "OSCR", *above]
    columns = ["aupr_unseen", "aupr_seen", "fpr95", "missed95", "oscr", *(["flagged_above"] if above else [])]
    columns += ["seen", "unseen"]
    rows = []
    for row in found.scores.to_dicts():
        ends = interval(row["auroc_low"], row["auroc_high"])
        rows.append([row["score"], row["auroc"], ends, *(row[column] for column in columns)])
    share = found.unseen / (found.seen + found.unseen)
    lines = [table(rows, [*header, "seen", "unseen"])] if rows else []
    lines += [f"{name}: {SCORES[name]}" for name in found.scores["score"]]
    reasons: dict[str, list[str]] = {}
    for name, reason in found.not_computable.items():
        reasons.setdefault(reason, []).append(name)
    lines += [f"not computable: {', '.join(names)} ({reason})" for reason, names in reasons.items()]
    if found.above:
        lines.append(
            f"flagged, {found.above} right: share of the unseen that are flagged where 5 % of the seen are, "
            f"and whose {found.above} is named right: found as a new {found.rank} in the right place"
        )
    return [*lines, *NOTES, f"AUPR by chance: unseen {share:.4f}, seen {1 - share:.4f}"] if rows else lines


def _ranks(found: OpenSet) -> list[str]:
    """Accuracy at each rank, of specimens of seen taxa and of unseen ones."""
    rows: list[list[Any]] = []
    for row in found.ranks.to_dicts():
        cells = [row["answers"], row["rank"]]
        for place in ("seen", "unseen"):
            ends = interval(row[f"{place}_macro_low"], row[f"{place}_macro_high"])
            cells += [row[f"{place}_micro"], row[f"{place}_macro"], ends, row[place]]
        rows.append([*cells, row["hm_micro"], row["hm_macro"]])
    columns = ["seen micro", "macro", "95 %", "n", "unseen micro", "macro", "95 %", "n"]
    lines = [table(rows, ["answers", "rank", *columns, "HM micro", "HM macro"])]
    lines += [f"{name}: {ANSWERS[name]}" for name in found.ranks["answers"].unique(maintain_order=True)]
    return [
        *lines,
        f"HM: harmonic mean of seen and unseen; seen is what the model knows at rank {found.rank}",
    ]


def _named_above(found: OpenSet) -> list[str]:
    """What is known of an unseen specimen by the rank above."""
    lines = []
    for row in found.named_above.filter(pl.col("specimens") > 0).to_dicts():
        of = f" whose {found.above} the model knows" if row["of"] == "known" else ""
        lines.append(
            f"{found.above} right for {row['share']:.1%} ({row['low']:.1%}–{row['high']:.1%}) of "
            f"{row['specimens']:,} unseen specimens{of}"
        )
    return lines


def _taxa(found: OpenSet) -> str:
    """The unseen taxa, those with most specimens first."""
    scores = [name for name in ("msp", "knn") if name in found.taxa.columns]
    above = [f"{found.above} right"] if found.above else []
    rows = []
    for row in found.taxa.head(SHOWN).to_dicts():
        named = f"{row['named']} ({row['times']:,})" if row["named"] else None
        share = [row["right_above"]] if found.above else []
        rows.append([row["taxon"], row["specimens"], *share, *(row[name] for name in scores), named])
    header = ["unseen taxon", "n", *above, *(f"AUROC {name}" for name in scores), "mostly taken for"]
    more = found.taxa.height - SHOWN
    tail = f"\n… and {more:,} more unseen taxa: --csv or --json gives all" if more > 0 else ""
    return table(rows, header) + tail
