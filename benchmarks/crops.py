"""The insect finder: how fast, and how right.

`python -m benchmarks crops` measures speed; `python -m benchmarks.crops --accuracy [--sheet worst.png]`
compares it with what people drew, on real photographs under BIOSCAN_SHARED, and with the masks of artificial
wells. The finder's curves were fitted to half A (`crop_curves`); half B is what it is judged by.
"""

import argparse
import csv
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from benchmarks.measure import interleaved
from bioscan.app.gallery import contact_sheet
from bioscan.data.decode import decode_image
from bioscan.data.localise import find_insect, working_picture
from bioscan.data.synthesis import SynthesisSettings, synthesize
from bioscan.data.synthesis_pictures import QUALITY, Studio, plate_light

if TYPE_CHECKING:
    from PIL.Image import Image

HALF_A: Final = ("CRCEA", "CRALA")
HALF_B: Final = ("CRALB", "CRBLA")
PROJECTS: Final = {"A": HALF_A, "B": HALF_B}
SEED: Final = 77
"""Of the artificial wells that accuracy is measured on."""
WELLS: Final = 300
WORST: Final = 20
PICTURES: Final = {"small": 12, "full": 200}
SIZES: Final = ((1024, 768), (341, 256))
"""Width and height of the failed-crop photographs, and of the package `original_256`."""

Pixels = NDArray[np.uint8]
Box = NDArray[np.float64]


def run(size: str, work: Path) -> list[dict[str, Any]]:
    """Pictures a second of `find_insect` in one process on one thread; floor: shrinking the same pictures."""
    import cv2

    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        rows = []
        wells = [w.pixels for w in synthesized(work, SEED, PICTURES[size])][: PICTURES[size]]
        for width, height in SIZES:
            pictures: list[Pixels] = [
                np.asarray(cv2.resize(p, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8)
                for p in wells
            ]
            ours, floor = interleaved(
                partial(_each, find_insect, pictures), partial(_each, working_picture, pictures), rounds=3
            )
            rows.append(
                {
                    "work": "find the insect, 1 core; floor: shrink to working size",
                    "size": f"{len(pictures):,} of {width} x {height}",
                    "value": len(pictures) / ours,
                    "unit": "images/s",
                    "floor": len(pictures) / floor,
                    "ratio": floor / ours,
                    "bound": "≥ 33 images/s",
                }
            )
    finally:
        cv2.setNumThreads(threads)
    return rows


def _each(function: Callable[[Pixels], Any], pictures: Sequence[Pixels]) -> None:
    for pixels in pictures:
        function(pixels)


class Photograph(NamedTuple):
    """A photograph and what a person, or the program that drew it, says is there."""

    name: str
    quality: str
    pixels: Pixels
    box: Box | None
    mask: NDArray[np.bool_] | None


def shared_folder() -> Path:
    """BIOSCAN_SHARED, by default beside the project."""
    return Path(os.environ.get("BIOSCAN_SHARED", Path(__file__).parents[1] / ".." / "shared"))


def read_pixels(path: Path) -> Pixels:
    """RGB, H x W x 3."""
    return decode_image(path.read_bytes(), name=path.name, place=str(path))


def photographs(shared: Path, projects: Sequence[str], *, outlines: bool = False) -> Iterator[Photograph]:
    """The failed-crop photographs of these projects; with `outlines`, as masks too."""
    folder = shared / "data" / "bioscan_crop"
    with (folder / "quality.tsv").open(encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file, delimiter="\t") if r["processid"].startswith(tuple(projects))]
    coco = json.loads((folder / "annotations_coco.json").read_text(encoding="utf-8")) if outlines else None
    for row in rows:
        pixels = read_pixels(folder / "original_1024" / row["image_file"])
        x, y, width, height = (float(row[name]) for name in "xywh")
        box = np.array([x, y, x + width, y + height]) if row["has_box"] == "1" else None
        mask = _outlined(coco, row["image_file"], pixels.shape[:2]) if coco else None
        yield Photograph(row["processid"], row["quality"], pixels, box, mask)


def _outlined(coco: Any, name: str, shape: Sequence[int]) -> NDArray[np.bool_]:
    import cv2

    mask = np.zeros(shape, np.uint8)
    number = next(image["id"] for image in coco["images"] if image["file_name"] == name)
    for annotation in coco["annotations"]:
        if annotation["image_id"] == number:
            for outline in annotation["segmentation"]:
                points = np.array(outline).reshape(-1, 2).round().astype(np.int32)
                cv2.fillPoly(mask, [points], 1)
    return mask.astype(bool)


def synthesized(folder: Path, seed: int, specimens: int) -> list[Photograph]:
    """Artificial wells with an insect, then the empty control wells of their plates; made if not there."""
    out = folder / f"wells_{seed}_{specimens}"
    if not out.exists():
        synthesize(out, SynthesisSettings(specimens=specimens, seed=seed, imbalance=0.3))
    coco = json.loads((out / "truth" / "boxes.coco.json").read_text(encoding="utf-8"))
    names = {image["id"]: image["file_name"] for image in coco["images"]}
    found = []
    for annotation in coco["annotations"]:
        pixels = read_pixels(out / names[annotation["image_id"]])
        x, y, width, height = annotation["bbox"]
        mask = _decoded(annotation["segmentation"])
        box = np.array([x, y, x + width, y + height], float)
        found.append(Photograph(names[annotation["image_id"]], "synthesized", pixels, box, mask))
    for path in sorted((out / "control_wells").glob("*.jpg")):
        pixels = read_pixels(path)
        found.append(Photograph(path.name, "synthesized", pixels, None, np.zeros(pixels.shape[:2], bool)))
    return found


def _decoded(encoded: Any) -> NDArray[np.bool_]:
    """COCO's uncompressed run lengths, by columns, first those of zeros."""
    runs = encoded["counts"]
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(encoded["size"][::-1]).T


def box_iou(first: Box, second: Box) -> float:
    """Intersection over union."""
    low, high = np.maximum(first[:2], second[:2]), np.minimum(first[2:], second[2:])
    shared = float(np.prod(np.maximum(high - low, 0)))
    areas = sum(float(np.prod(box[2:] - box[:2])) for box in (first, second))
    return shared / (areas - shared)


class Outcome(NamedTuple):
    """What the finder said of one picture beside what is there."""

    quality: str
    truth: Box | None
    kind: str
    box: Box | None
    score: float
    name: str = ""

    @property
    def iou(self) -> float:
        """0 where no box was found or nothing is there."""
        return 0.0 if self.truth is None or self.box is None else box_iou(self.box, self.truth)


def table_lines(outcomes: Sequence[Outcome]) -> list[str]:
    """By quality: overlap where something is there, «none» where nothing is, `many`; then all together."""
    lines = [
        f"{'quality':<14}{'boxed':>6}{'median':>8}{'mean':>6}{'≥ .5':>6}{'≥ .75':>6}{'none':>6}{'many':>6}"
        f"{'empty':>8}{'none':>6}{'many':>6}"
    ]
    boxed_known = [o for o in outcomes if o.truth is not None and o.quality not in ("empty", "synthesized")]
    groups = {quality: [o for o in outcomes if o.quality == quality] for quality in _qualities(outcomes)}
    if boxed_known:
        groups["with a box*"] = boxed_known
    for quality, group in groups.items():
        boxed = [o for o in group if o.truth is not None]
        empty = [o for o in group if o.truth is None]
        cells = f"{quality:<14}{len(boxed):>6}"
        overlap = np.array([o.iou for o in boxed])
        if boxed:
            cells += f"{np.median(overlap):>8.3f}{overlap.mean():>6.3f}{(overlap >= 0.5).mean():>6.1%}"
            cells += (
                f"{(overlap >= 0.75).mean():>6.1%}{_share(boxed, 'none'):>6.1%}{_share(boxed, 'many'):>6.1%}"
            )
        else:
            cells += f"{'–':>8}" + f"{'–':>6}" * 5
        cells += f"{len(empty):>8}" + (
            f"{_share(empty, 'none'):>6.1%}{_share(empty, 'many'):>6.1%}" if empty else f"{'–':>6}" * 2
        )
        lines.append(cells)
    found = [o for o in outcomes if o.box is not None]
    right, scores = np.array([o.iou >= 0.5 for o in found]), np.array([o.score for o in found])
    lines.append(
        f"* not marked empty. AUC of the score for IoU ≥ .5, {len(found)} boxes: {_auc(scores, right):.3f}"
    )
    return lines


def _qualities(outcomes: Sequence[Outcome]) -> list[str]:
    return sorted({o.quality for o in outcomes}, key=lambda q: (q != "valid", q))


def _share(outcomes: Sequence[Outcome], kind: str) -> float:
    return sum(o.kind == kind for o in outcomes) / len(outcomes)


def _auc(scores: NDArray[np.float64], right: NDArray[np.bool_]) -> float:
    """Chance that a right one has the higher score, ties half; NaN without both."""
    if right.all() or not right.any():
        return float("nan")
    difference = scores[right][:, None] - scores[~right][None]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def empty_wells(count: int, seed: int) -> list[Photograph]:
    """Artificial wells without an insect, each in the light of another plate, as JPEG shows them."""
    studio, found = Studio(), []
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        drawn, _ = studio.photograph(None, plate_light(rng), rng)
        data = simplejpeg.encode_jpeg(drawn, quality=QUALITY, colorsubsampling="420")
        pixels = decode_image(data, name=f"empty well {number}", place="memory")
        found.append(Photograph(f"empty well {number}", "synthesized", pixels, None, None))
    return found


def find_all(pictures: Sequence[Photograph]) -> list[Outcome]:
    """What `find_insect` says of each."""
    outcomes = []
    for picture in pictures:
        found = find_insect(picture.pixels)
        box, score = (found.boxes[0], float(found.scores[0])) if len(found.boxes) else (None, 0.0)
        outcomes.append(Outcome(picture.quality, picture.box, found.kind, box, score, picture.name))
    return outcomes


def golden_pairs(shared: Path) -> list[Photograph]:
    """The five published originals, with the box that the published crop was made from.

    The crop's place is found by matching it at many scales; the box follows from the margin rule, which
    widens each axis by 0.4 of the longer side.
    """
    import cv2

    folder = shared / "data" / "bioscan1m_orders"
    found = []
    for path in sorted((folder / "cropped_256").glob("*.jpg")):
        original, crop = read_pixels(folder / "original_256" / path.name), read_pixels(path)
        edge = 100  # what the crop shows beyond the picture is 240
        padded = np.pad(original, ((edge, edge), (edge, edge), (0, 0)), constant_values=240)
        best = (-1.0, 0, 0, 0, 0)
        for shorter in range(40, 257):
            scale = shorter / min(crop.shape[:2])
            size = round(crop.shape[1] * scale), round(crop.shape[0] * scale)
            if size[0] > padded.shape[1] or size[1] > padded.shape[0]:
                break
            small = cv2.resize(crop, size, interpolation=cv2.INTER_AREA)
            _, match, _, (left, top) = cv2.minMaxLoc(cv2.matchTemplate(padded, small, cv2.TM_CCOEFF_NORMED))
            best = max(best, (match, left - edge, top - edge, *size))
        _, x, y, width, height = best
        margin = 0.4 * max(width, height) / 1.4 / 2
        box = np.array([x + margin, y + margin, x + width - margin, y + height - margin])
        found.append(Photograph(f"{path.stem} (match {best[0]:.3f})", "golden", original, box, None))
    return found


def marked(pixels: Pixels, *boxes: tuple[Box | None, tuple[int, int, int]]) -> Pixels:
    """A copy with boxes drawn."""
    import cv2

    made, width = pixels.copy(), max(1, min(pixels.shape[:2]) // 190)
    for box, colour in boxes:
        if box is not None:
            x0, y0, x1, y1 = (round(float(v)) for v in box)
            cv2.rectangle(made, (x0, y0), (x1, y1), colour, width)
    return made


def main() -> None:
    """Print the tables, draw the sheet."""
    parser = argparse.ArgumentParser(prog="benchmarks.crops", description=__doc__)
    parser.add_argument("--accuracy", action="store_true", required=True, help="compare boxes with the truth")
    parser.add_argument("--sheet", type=Path, help="draw the worst of half B there, as PNG")
    arguments = parser.parse_args()
    shared = shared_folder()
    everything: list[Outcome] = []
    for half, projects in PROJECTS.items():
        pictures = list(photographs(shared, projects))
        outcomes = find_all(pictures)
        everything += outcomes
        print(
            f"\nhalf {half}: {', '.join(projects)}{' (the curves were fitted to it)' if half == 'A' else ''}"
        )
        print("\n".join(table_lines(outcomes)), flush=True)
        if half == "B" and arguments.sheet:
            worst_sheet(pictures, outcomes).save(arguments.sheet)
    print("\nboth halves")
    print("\n".join(table_lines(everything)))
    with tempfile.TemporaryDirectory() as folder:
        wells = [w for w in synthesized(Path(folder), SEED, WELLS) if w.box is not None]
        print(f"\nartificial wells, seed {SEED}")
        print("\n".join(table_lines(find_all(wells + empty_wells(WELLS, SEED)))), flush=True)
    print("\nboxes of published crops")
    for outcome in find_all(golden_pairs(shared)):
        print(f"{outcome.name}: {outcome.kind}, IoU {outcome.iou:.3f}, score {outcome.score:.2f}")


def worst_sheet(pictures: Sequence[Photograph], outcomes: Sequence[Outcome]) -> "Image":
    """The worst boxes, first of those marked valid, then of the others that are not marked empty.

    Annotated in green, found in red; of equal overlap, the surest comes first and what was missed last.
    """
    boxed = [i for i, o in enumerate(outcomes) if o.truth is not None and o.quality != "empty"]
    order = sorted(boxed, key=lambda i: (outcomes[i].iou, -outcomes[i].score))
    tiles = []
    for valid in (True, False):
        for i in [i for i in order if (outcomes[i].quality == "valid") == valid][:WORST]:
            outcome = outcomes[i]
            told = f"{outcome.kind}, IoU {outcome.iou:.2f}, score {outcome.score:.2f}"
            boxes = (outcome.truth, (0, 160, 0)), (outcome.box, (220, 0, 0))
            tiles.append((f"{outcome.name} {outcome.quality}\n{told}", marked(pictures[i].pixels, *boxes)))
    return contact_sheet(tiles, columns=5, size=300, title="Worst of half B: annotated green, found red")


if __name__ == "__main__":
    main()
