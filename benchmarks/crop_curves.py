"""Makes the curves of `bioscan.data.localise` anew: `python -m benchmarks.crop_curves [--write] [--check]`.

From half A of the failed-crop photographs (BIOSCAN_SHARED/data/bioscan_crop, projects CRCEA and CRALA) with
their outlines, and artificial wells with their masks. Half B is not read. Each curve is a piecewise linear
spline; the sum is a logistic regression with an L2 penalty. What one stage says of a picture that the next
stage is fitted to comes from a fit without the pictures of its plate (stacking).
"""

import argparse
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import cv2
import numpy as np
import scipy.sparse
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from benchmarks.crops import (
    HALF_A,
    Outcome,
    Photograph,
    box_iou,
    photographs,
    shared_folder,
    synthesized,
    table_lines,
)
from bioscan.data import localise
from bioscan.data.localise_curves import KNOTS, Curves

TARGET: Final = Path(localise.__file__).with_name("localise_curves.py")
SEED: Final = 11
"""Of the artificial wells; those that accuracy is measured on have another."""
WELLS: Final = 240
FOLDS: Final = 5
PIXELS: Final = (500, 800)
"""Of an insect, of the rest, in each photograph; artificial wells give `WELL_PIXELS`."""
WELL_PIXELS: Final = (200, 300)
PENALTY: Final = 0.05
"""C of the pixels' regressions (.005 to 1 give equal boxes)."""
REGION_PENALTY: Final = 0.1


class Case(NamedTuple):
    """A picture, measured."""

    group: str
    """Plate, or the well's own number: never cut by a fold."""
    maps: dict[str, NDArray[np.uint8]]
    mask: NDArray[np.bool_]
    box: NDArray[np.float64] | None
    """In working pixels; None where nothing is there."""
    quality: str


Fitted = dict[str, Curves]


def main() -> None:
    """Fit, cross-validate, write."""
    parser = argparse.ArgumentParser(prog="benchmarks.crop_curves", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"replace {TARGET.name}")
    parser.add_argument(
        "--check", action="store_true", help="cross-validate: by plate, and project by project"
    )
    arguments = parser.parse_args()
    cases = gather()
    photos = [c for c in cases if c.quality != "synthesized"]
    print(f"{len(photos)} photographs, {len(cases) - len(photos)} artificial wells")
    if arguments.check:
        for name, folds in {
            f"{FOLDS} folds of plates": _folds(cases),
            "the other project": np.array([{"CRCEA": 0, "CRALA": 1}.get(c.group[:5], -1) for c in cases]),
        }.items():
            outcomes: list[Outcome] = []
            for fold in range(folds.max() + 1):
                fitted = fit([c for c, f in zip(cases, folds, strict=True) if f != fold])
                held_out = [c for c, f in zip(cases, folds, strict=True) if f == fold]
                outcomes += [find(c, fitted) for c in held_out]
            print(f"\nheld out: {name}")
            for drawn in (False, True):
                some = [o for o in outcomes if (o.quality == "synthesized") == drawn]
                if some:
                    print("\n".join(table_lines(some)), flush=True)
    if arguments.write:
        TARGET.write_text(module_text(fit(cases)), encoding="utf-8")
        print(f"written: {TARGET.name}")


def gather() -> list[Case]:
    """Half A without the fragments that nobody boxed, and artificial wells with and without an insect."""
    cases = []
    for photo in photographs(shared_folder(), HALF_A, outlines=True):
        if photo.box is not None or photo.quality == "empty":
            project, number = re.match(r"([A-Z]+)(\d+)", photo.name).groups()  # type: ignore[union-attr]
            cases.append(_case(photo, f"{project}-{int(number) // 95}"))  # 95 specimens and a control a plate
    with tempfile.TemporaryDirectory() as folder:
        wells = synthesized(Path(folder), SEED, specimens=1500)
        chosen = np.random.default_rng(3).permutation(len(wells))
        empty = [w for w in wells if w.box is None]
        insects = [wells[i] for i in chosen if wells[i].box is not None][:WELLS]
        cases += [_case(w, f"well-{i}") for i, w in enumerate(insects + empty)]
    return cases


def _case(photo: Photograph, group: str) -> Case:
    picture = localise.working_picture(photo.pixels)
    h, w = picture.shape[:2]
    assert photo.mask is not None
    share = cv2.resize(photo.mask.astype(np.float32), (w, h), interpolation=cv2.INTER_AREA)
    scale = np.tile([w / photo.pixels.shape[1], h / photo.pixels.shape[0]], 2)
    box = None if photo.box is None else photo.box * scale
    return Case(group, localise.measure_pixels(picture), share > 0.5, box, photo.quality)


def fit(cases: Sequence[Case]) -> Fitted:
    """All curves, from these cases alone."""
    folds = _folds(cases)
    rng = np.random.default_rng(1)
    places = [_places(c, *(WELL_PIXELS if c.quality == "synthesized" else PIXELS), rng) for c in cases]
    truth = [c.mask[tuple(p.T)] for c, p in zip(cases, places, strict=True)]
    maps: list[Mapping[str, NDArray[np.uint8]]] = [c.maps for c in cases]
    fitted: Fitted = {}
    chances: list[NDArray[np.float32]] = []
    for stage in ("PIXEL_CURVES", "NEAR_CURVES"):
        rows = [
            np.stack([m[tuple(p.T)] for m in own.values()], -1) for own, p in zip(maps, places, strict=True)
        ]
        names = list(maps[0])
        fitted[stage], others = _stacked(names, rows, truth, folds, PENALTY)
        chances = [localise.curve_sum(own, others[f]) for own, f in zip(maps, folds, strict=True)]
        maps = [{**c.maps, **localise.measure_neighbourhood(p)} for c, p in zip(cases, chances, strict=True)]
    measured, right = [], []
    for case, chance in zip(cases, chances, strict=True):
        regions = localise.find_regions(chance, case.maps)
        for region in regions:
            measured.append(localise.region_measurements(region, regions))
            overlap = 0.0 if case.box is None else box_iou(np.array(region.box, float), case.box)
            right.append(overlap >= 0.5)
    names = list(measured[0])
    table = np.array([[m[name] for name in names] for m in measured])
    fitted["REGION_CURVES"] = _fitted(names, table, np.array(right), REGION_PENALTY)
    return fitted


def find(case: Case, fitted: Fitted) -> Outcome:
    """What `find_insect` would say with these curves; boxes in working pixels."""
    alone = localise.curve_sum(case.maps, fitted["PIXEL_CURVES"])
    maps = {**case.maps, **localise.measure_neighbourhood(alone)}
    regions = localise.find_regions(localise.curve_sum(maps, fitted["NEAR_CURVES"]), case.maps)
    kind, order, scores = localise.choose_regions(regions, fitted["REGION_CURVES"])
    box = np.array(regions[order[0]].box, float) if order else None
    return Outcome(case.quality, case.box, kind, box, scores[0] if scores else 0.0, case.group)


def _folds(cases: Sequence[Case]) -> NDArray[np.int64]:
    groups = sorted({c.group for c in cases})
    fold = dict(zip(groups, np.random.default_rng(0).permutation(len(groups)) % FOLDS, strict=True))
    return np.array([fold[c.group] for c in cases])


def _places(case: Case, inside: int, outside: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Rows and columns of pixels to learn from; of the rest, those that look like something more often."""
    insect, rest = np.argwhere(case.mask), np.argwhere(~case.mask)
    dark = np.maximum(case.maps["dark_wide"].astype(float) - 64, 0)
    weight = (dark + case.maps["black_hat_5"] + 0.5 * case.maps["edge_2"] + 5)[~case.mask]
    chosen = rng.choice(len(rest), min(outside, len(rest)), replace=False, p=weight / weight.sum())
    if len(insect) > inside:
        insect = insect[rng.choice(len(insect), inside, replace=False)]
    return np.concatenate([insect, rest[chosen]])


def _stacked(
    names: Sequence[str],
    rows: Sequence[NDArray[Any]],
    truth: Sequence[NDArray[np.bool_]],
    folds: NDArray[np.int64],
    penalty: float,
) -> tuple[Curves, dict[int, Curves]]:
    """Curves from all rows, and for each fold those from all the others."""
    where = np.repeat(folds, [len(r) for r in rows])
    table, right = np.concatenate(list(rows)), np.concatenate(list(truth))
    others = {
        int(fold): _fitted(names, table[where != fold], right[where != fold], penalty)
        for fold in np.unique(folds)
    }
    return _fitted(names, table, right, penalty), others


def _fitted(names: Sequence[str], table: NDArray[Any], right: NDArray[np.bool_], penalty: float) -> Curves:
    """A curve a column; the intercept is added to the first."""
    model = LogisticRegression(C=penalty, max_iter=300, tol=1e-3).fit(_hats(table), right)
    curves = model.coef_[0].astype(np.float64).reshape(len(names), len(KNOTS))
    curves[0] += model.intercept_[0]
    return {name: tuple(curve) for name, curve in zip(names, np.round(curves, 2).tolist(), strict=True)}


def _hats(table: NDArray[Any]) -> Any:
    """N x C measurements to N x (C x knots) shares of the two knots beside each (a linear B-spline)."""
    knots = np.array(KNOTS, np.float32)
    values = table.astype(np.float32)
    num, columns = values.shape
    left = np.clip(np.searchsorted(knots, values, side="right") - 1, 0, len(knots) - 2)
    share = (values - knots[left]) / (knots[left + 1] - knots[left])
    at = np.arange(columns) * len(knots) + left
    shape = num, columns * len(knots)
    entries = np.stack([1 - share, share], -1).ravel()
    return scipy.sparse.csr_matrix(
        (entries, (np.repeat(np.arange(num), 2 * columns), np.stack([at, at + 1], -1).ravel())), shape=shape
    )


def module_text(fitted: Fitted) -> str:
    """The module `localise_curves`."""
    lines = [
        '"""The curves of `localise`: what each measurement adds to the logit.',
        "",
        "Made by `python -m benchmarks.crop_curves --write` from half A of the failed-crop photographs of",
        "BIOSCAN-1M (projects CRCEA and CRALA) and from artificial wells. Not edited by hand.",
        '"""',
        "",
        "from collections.abc import Mapping",
        "from typing import Final",
        "",
        "Curves = Mapping[str, tuple[float, ...]]",
        "",
        f"KNOTS: Final = {KNOTS}",
        '"""Where a curve is given, straight between; measurements are scaled to 0 to 255."""',
    ]
    told = {
        "PIXEL_CURVES": "A pixel by itself: measurements of `localise.measure_pixels`.",
        "NEAR_CURVES": "A pixel, with what the first sum says of its neighbourhood.",
        "REGION_CURVES": "A region: measurements of `localise.region_measurements`.",
    }
    for stage, text in told.items():
        lines += [f"{stage}: Final[Curves] = {{"]
        lines += [
            f'    "{name}": ({", ".join(repr(v) for v in curve)}),' for name, curve in fitted[stage].items()
        ]
        lines += ["}", f'"""{text}"""']
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
