"""The nearest vectors of a gallery by cosine, exactly. The one neighbour search of the package.

Q: queries, G: vectors of the gallery, F: features, K: neighbours.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.floating[Any]]

_QUERIES: Final = 1024
_GALLERY: Final = 8192
"""Queries and vectors of the gallery that are compared at a time: 32 MB of cosines."""
_UNEVEN: Final = 1e-4
"""How far the square of a length may be from 1 by rounding."""


def unit(vectors_NF: Vectors) -> NDArray[np.float32]:
    """Vectors scaled to length 1, in float32; a vector of zeros stays one.

    Raises:
        ValueError: a number that is not finite.
    """
    made_NF = vectors_NF.astype(np.float32)
    largest_N = np.abs(made_NF).max(axis=1, initial=0.0)
    if not np.isfinite(largest_N).all():
        raise ValueError("vectors of finite numbers expected")
    made_NF /= np.where(largest_N > 0, largest_N, 1)[:, None]  # squares neither overflow nor vanish
    length_N = np.sqrt(np.einsum("nf,nf->n", made_NF, made_NF))
    made_NF /= np.where(length_N > 0, length_N, 1)[:, None]
    return made_NF


def nearest(
    queries_QF: Vectors,
    gallery_GF: NDArray[np.float32],
    k: int,
    *,
    own_Q: NDArray[np.integer[Any]] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The k vectors of a gallery whose cosine with each query is largest, the nearest first.

    Every pair is compared, block by block, so memory does not grow with Q × G. Of equal cosines the one with
    the lower place in the gallery comes first. The cosine with a vector of zeros is 0.

    Args:
        queries_QF: Of any length.
        gallery_GF: As `unit` makes it.
        k: Neighbours; all of the gallery where it has fewer.
        own_Q: Place in the gallery that a query is not compared with, itself; -1 where it is not in there.

    Returns:
        Places in the gallery and cosines, both Q × K. At the end of a row -1 and -inf where nothing is left.

    Raises:
        ValueError: k below 1; an empty gallery, or one that is not of length 1; a number that is not finite.

    >>> places, cosines = nearest(np.array([[1.0, 0.1]]), unit(np.array([[0.0, 5.0], [2.0, 0.0]])), k=1)
    >>> places.tolist(), cosines.round(3).tolist()
    ([[1]], [[0.9950000047683716]])
    """
    if k < 1 or not len(gallery_GF):
        raise ValueError(f"{k} neighbours of a gallery of {len(gallery_GF)}")
    length_G = np.einsum("gf,gf->g", gallery_GF, gallery_GF)
    if not ((np.abs(length_G - 1) < _UNEVEN) | (length_G == 0)).all():
        raise ValueError("a gallery of vectors of length 1 expected; `unit` makes them")
    k = min(k, len(gallery_GF))
    places_QK = np.empty((len(queries_QF), k), np.int64)
    cosines_QK = np.empty((len(queries_QF), k), np.float32)
    for start in range(0, len(queries_QF), _QUERIES):
        rows = slice(start, start + _QUERIES)
        own_B = None if own_Q is None else own_Q[rows]
        places_QK[rows], cosines_QK[rows] = _nearest(unit(queries_QF[rows]), gallery_GF, k, own_B)
    return places_QK, cosines_QK


def _nearest(
    queries_BF: NDArray[np.float32],
    gallery_GF: NDArray[np.float32],
    k: int,
    own_B: NDArray[np.integer[Any]] | None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The nearest of one block of queries; the gallery is gone through in blocks."""
    places_BK = np.full((len(queries_BF), k), -1, np.int64)
    cosines_BK = np.full((len(queries_BF), k), -np.inf, np.float32)
    for first in range(0, len(gallery_GF), _GALLERY):
        cosines_BG = queries_BF @ gallery_GF[first : first + _GALLERY].T
        if own_B is not None:
            inside = np.flatnonzero((own_B >= first) & (own_B < first + cosines_BG.shape[1]))
            cosines_BG[inside, own_B[inside] - first] = -np.inf
        places_BK, cosines_BK = _merged(places_BK, cosines_BK, cosines_BG, first)
    return places_BK, cosines_BK


def _merged(
    places_BK: NDArray[np.int64], cosines_BK: NDArray[np.float32], cosines_BG: NDArray[np.float32], first: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The k best of those held and those of a block of the gallery that starts at `first`."""
    k = cosines_BK.shape[1]
    width = cosines_BG.shape[1]
    least_B = cosines_BK[:, -1]  # a place further on must be better than what is held
    if first == 0 and width > k:
        least_B = np.nextafter(np.partition(cosines_BG, width - k, axis=1)[:, width - k], np.float32(-np.inf))
    rows, columns = np.nonzero(cosines_BG > least_B[:, None])
    held_rows = np.repeat(np.arange(len(cosines_BK)), k)
    all_rows = np.concatenate([held_rows, rows])
    all_places = np.concatenate([places_BK.ravel(), columns + first])
    all_cosines = np.concatenate([cosines_BK.ravel(), cosines_BG[rows, columns]])
    all_places_ordered = np.where(all_places < 0, np.iinfo(np.int64).max, all_places)  # nobody comes last
    order = np.lexsort((all_places_ordered, -all_cosines, all_rows))
    starts = np.searchsorted(all_rows[order], np.arange(len(cosines_BK)))
    best = order[starts[:, None] + np.arange(k)]
    return all_places[best], all_cosines[best]
