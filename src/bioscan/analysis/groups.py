"""Groups of specimens that resemble each other beyond their taxon, and a cut that keeps each group whole.

Specimens of one plate were mostly caught in one trap and photographed in one session; those of one BIN are
near relatives. What is measured on some of a group says little about strangers, so a group lies on one side
of a cut. N: specimens.
"""

from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bioscan.analysis.conformal import uniforms
from bioscan.errors import RequestError, near
from bioscan.vocabulary import SAMPLE_ID

KINDS: Final = ("auto", "plate", "bin", "none")
LEAST: Final = 10
"""Groups that each part of a cut needs: the least from which a set or a threshold of error 0.1 follows."""
_NEARLY_ALL: Final = 0.9
_OWN_NAMES: Final = ("key", "sampleid", "image_file")


def groups_of(frame: pl.DataFrame, by: str = "auto") -> tuple[pl.Series, str]:
    """The group of each specimen.

    Args:
        frame: With one or several of the columns `key`, `sampleid` and `image_file`; plates come from the
            sample ids (PLATE-A01), BINs from column `uri`.
        by: `plate`, `bin`, any column, `none` (each specimen is a group) or `auto`: plates where nearly all
            specimens have one, else BINs where there are any, else none. Of plates or BINs so few that no
            cut has LEAST in each part, `auto` takes none.

    Returns:
        Names without nulls (a specimen without a plate, BIN or value is a group of its own, by its own name),
        and what they are: `auto` decided.

    Raises:
        RequestError: a column that is not there.
    """
    own_names = [pl.col(column).cast(pl.String) for column in _OWN_NAMES if column in frame.columns]
    if not own_names:
        raise RequestError(f"specimens have no names: one of the columns {', '.join(_OWN_NAMES)} is needed")
    own = pl.coalesce(*own_names, pl.int_range(pl.len()).cast(pl.String))
    if by == "auto":
        by = _found(frame)
    if by == "none":
        shared = pl.lit(None, pl.String)
    elif by == "plate":
        shared = _plate(frame)
    else:
        column = "uri" if by == "bin" else by
        if column not in frame.columns:
            known = sorted({*KINDS, *frame.columns})
            raise RequestError(f"no column '{column}' to group specimens by{near(column, known)}")
        shared = pl.col(column).cast(pl.String)
    return frame.select(pl.coalesce(shared, own).alias("group")).to_series(), by


def cut(groups: pl.Series, share: float, seed: int = 0) -> NDArray[np.bool_]:
    """Which specimens are of the second part: about a share of the groups, each of them whole.

    A group's part follows from its name and the seed alone, by a hash: it does not depend on what other
    specimens there are, or on their order.

    Args:
        groups: Names, from `groups_of`.
        share: Of the groups that go to the second part, 0 to 1.
        seed: Another one makes another cut.
    """
    names = groups.unique()
    drawn = uniforms([f"group {name}" for name in names.to_list()], seed)
    second = names.filter(pl.Series(drawn < share, dtype=pl.Boolean))
    return groups.is_in(second.implode()).to_numpy()


def too_few(groups: pl.Series, second_N: NDArray[np.bool_]) -> bool:
    """Whether a part of a cut has fewer than LEAST groups: then it is better not cut at all."""
    second = pl.Series(second_N, dtype=pl.Boolean)
    return min(groups.filter(part).n_unique() for part in (second, ~second)) < LEAST


def _found(frame: pl.DataFrame) -> str:
    if frame.height:
        plates = frame.select(_plate(frame).alias("plate")).to_series()
        nearly = plates.drop_nulls().len() >= _NEARLY_ALL * frame.height
        if nearly and plates.drop_nulls().n_unique() >= 2 * LEAST:
            return "plate"
        if "uri" in frame.columns and frame["uri"].drop_nulls().n_unique() >= 2 * LEAST:
            return "bin"
    return "none"


def _plate(frame: pl.DataFrame) -> pl.Expr:
    """From the sample id, the name before the well; null where it has no such form."""
    names = [pl.col(column) for column in ("sampleid", "key") if column in frame.columns]
    if not names:
        return pl.lit(None, pl.String)
    return pl.coalesce(names).cast(pl.String).str.extract(SAMPLE_ID.pattern, 1)
