"""The nearest vectors by cosine: scikit-learn, brute force, ties, and rows that must not count."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import NearestNeighbors

from bioscan.analysis import neighbours
from bioscan.analysis.neighbours import nearest, unit


def vectors(seed: int, rows: int, width: int = 8) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def test_neighbours_and_cosines_are_those_of_scikit_learn() -> None:
    queries, gallery = vectors(1, 300), 7 * vectors(2, 500)
    places, cosines = nearest(queries, unit(gallery), 6)
    oracle = NearestNeighbors(n_neighbors=6, metric="cosine", algorithm="brute").fit(gallery.astype(float))
    distances, expected = oracle.kneighbors(queries.astype(float))
    np.testing.assert_array_equal(places, expected)
    np.testing.assert_allclose(cosines, 1 - distances, atol=1e-6)


@pytest.fixture
def tiny_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_QUERIES", 3)
    monkeypatch.setattr(neighbours, "_GALLERY", 4)


@pytest.mark.usefixtures("tiny_blocks")
@settings(max_examples=60)
@given(data=st.data())
def test_blocks_give_what_sorting_all_pairs_gives_ties_by_place(data: st.DataObject) -> None:
    whole = st.integers(-1, 1)  # few values: many equal cosines, some vectors of zeros
    width = data.draw(st.integers(1, 3))
    rows = st.lists(st.lists(whole, min_size=width, max_size=width), min_size=1, max_size=14)
    queries, gallery = np.array(data.draw(rows), np.float32), np.array(data.draw(rows), np.float32)
    k = data.draw(st.integers(1, 16))
    own = np.array(
        data.draw(st.lists(st.integers(-1, len(gallery) - 1), min_size=len(queries), max_size=len(queries)))
    )
    all_pairs = unit(queries) @ unit(gallery).T
    all_pairs[own >= 0, own[own >= 0]] = -np.inf
    order = np.argsort(-all_pairs, axis=1, kind="stable")[:, :k]
    expected = np.take_along_axis(all_pairs, order, axis=1)
    places, cosines = nearest(queries, unit(gallery), k, own_Q=own)
    # equal to rounding: which of two that differ in the last bit comes first is the processor's choice
    np.testing.assert_allclose(cosines, expected, atol=1e-6)
    filled = places >= 0
    np.testing.assert_array_equal(filled, np.isfinite(expected))
    found = all_pairs[np.nonzero(filled)[0], places[filled]]
    np.testing.assert_allclose(found, expected[filled], atol=1e-6)
    for row in places:
        assert len(set(row[row >= 0])) == (row >= 0).sum()


@pytest.mark.usefixtures("tiny_blocks")
def test_of_equal_vectors_in_several_blocks_the_first_places_come_first() -> None:
    gallery = np.tile(np.array([[1, 0, 0, 0]], np.float32), (11, 1))
    places, cosines = nearest(gallery[:2], unit(gallery), 6)
    assert places.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert (cosines == 1).all()


def test_a_query_in_the_gallery_leaves_itself_out() -> None:
    gallery = unit(vectors(3, 50))
    own = np.arange(50)
    places, _ = nearest(gallery, gallery, 1, own_Q=own)
    similar = cosine_similarity(gallery)
    np.fill_diagonal(similar, -2)
    np.testing.assert_array_equal(places[:, 0], similar.argmax(axis=1))
    with_itself, _ = nearest(gallery, gallery, 1)
    np.testing.assert_array_equal(with_itself[:, 0], own)


def test_where_nothing_is_left_there_is_no_neighbour() -> None:
    places, cosines = nearest(np.ones((1, 2)), unit(np.ones((1, 2))), 3, own_Q=np.array([0]))
    assert places.tolist() == [[-1]]
    assert cosines.tolist() == [[-np.inf]]


def test_length_does_not_matter_and_very_long_or_short_vectors_neither_overflow_nor_vanish() -> None:
    queries, gallery = vectors(4, 20), vectors(5, 30)
    places, cosines = nearest(queries, unit(gallery), 3)
    for factor in (1e-25, 1e25):
        again, near = nearest(queries * np.float32(factor), unit(gallery * np.float32(factor)), 3)
        np.testing.assert_array_equal(again, places)
        np.testing.assert_allclose(near, cosines, rtol=1e-5)


def test_halves_are_compared_as_the_numbers_they_hold() -> None:
    queries, gallery = vectors(6, 20).astype(np.float16), vectors(7, 30).astype(np.float16)
    places, _ = nearest(queries, unit(gallery), 2)
    expected, _ = nearest(queries.astype(np.float64), unit(gallery.astype(np.float64)), 2)
    np.testing.assert_array_equal(places, expected)


def test_a_vector_of_zeros_is_as_near_to_everything_as_a_right_angle() -> None:
    _, cosines = nearest(np.zeros((1, 3)), unit(vectors(8, 4, 3)), 4)
    assert cosines.tolist() == [[0, 0, 0, 0]]
    assert unit(np.zeros((2, 3))).tolist() == [[0, 0, 0]] * 2


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_number_that_is_not_finite_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        nearest(np.array([[1, wrong]]), unit(np.ones((1, 2))), 1)
    with pytest.raises(ValueError, match="finite"):
        unit(np.array([[1, wrong]]))


def test_a_gallery_that_is_empty_or_not_of_length_1_is_refused() -> None:
    with pytest.raises(ValueError, match="0"):
        nearest(np.ones((1, 2)), np.ones((0, 2), np.float32), 1)
    with pytest.raises(ValueError, match="length 1"):
        nearest(np.ones((1, 2)), 2 * np.ones((1, 2), np.float32), 1)
    with pytest.raises(ValueError, match="0 neighbours"):
        nearest(np.ones((1, 2)), unit(np.ones((1, 2))), 0)


def test_no_queries_have_no_neighbours() -> None:
    places, cosines = nearest(np.ones((0, 2)), unit(np.ones((3, 2))), 2)
    assert places.shape == cosines.shape == (0, 2)
