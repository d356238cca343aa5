"""What several tests share: the folder of real data, oracles, and one small artificial dataset."""

import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bioscan.vocabulary import RANKS

SHARED = Path(os.environ.get("BIOSCAN_SHARED", Path(__file__).parents[1] / ".." / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real photographs, records and golden files; the test skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no real data at {SHARED.name} (set BIOSCAN_SHARED)")
    return SHARED


@pytest.fixture(scope="session")
def oracle() -> Callable[[str], str]:
    """Path of an independent program; fails where oracles are required (CI), else skips by name."""

    def find(program: str) -> str:
        path = shutil.which(program)
        if path is None:
            message = f"oracle '{program}' is not installed (see ci/debian.txt)"
            if os.environ.get("BIOSCAN_REQUIRE_ORACLES"):
                pytest.fail(message)
            pytest.skip(message)
        return path

    return find


@pytest.fixture
def run_bioscan(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command line in this process: exit status, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        from bioscan.app.cli import run

        status = run([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a small network, timm's `test_resnet`."""
    import torch

    from bioscan.learn.compat import import_timm

    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "weights.pt"
    torch.save(import_timm().create_model("test_resnet").state_dict(), path)
    return path


@pytest.fixture
def small(weights: Path) -> list[object]:
    """Flags of embed and adapt: that network, on small pictures."""
    return ["--model", "test_resnet", "--weights", weights, "--image-size", 36, "--crop-size", 32]


Paint = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="session")
def paint(tmp_path_factory: pytest.TempPathFactory) -> Paint:
    """Make a small dataset whose taxa differ in colour: `paint({"Diptera": (train, validation, test)})`.

    Taxa are paths from the order down, `Lepidoptera/Nymphalidae/Vanessa/Vanessa atalanta`. Gives the metadata
    file `insects.tsv` and the folder of pictures `insects`, in a new folder each time.
    """
    return partial(_painted, tmp_path_factory)


def _painted(
    places: pytest.TempPathFactory,
    counts: Mapping[str, tuple[int, int, int]],
    *,
    size: tuple[int, int] = (44, 36),
) -> tuple[Path, Path]:
    generator = np.random.default_rng(7)
    folder = places.mktemp("painted") / "insects"
    folder.mkdir()
    rows = ["\t".join(("sampleid", *RANKS[:8], "image_file", "large_insect_order", "copyright_license"))]
    for number, (taxon, parts) in enumerate(counts.items()):
        order, family, genus, species = (*taxon.split("/"), *["not_classified"] * 3)[:4]
        ranks = ("Arthropoda", "Insecta", order, family, "not_classified", "not_classified", genus, species)
        colour = np.array([number % 3 == 0, number % 3 == 1, number % 3 == 2]) * 120 + 40 + 20 * (number // 3)
        for role, count in zip(("train", "validation", "test"), parts, strict=True):
            for i in range(count):
                key = f"{taxon.split('/')[-1]}-{role}-{i}".replace(" ", "_")
                noise = generator.normal(0, 12, (size[1], size[0], 3))
                Image.fromarray(np.clip(colour + noise, 0, 255).astype(np.uint8)).save(folder / f"{key}.jpg")
                rows.append("\t".join((key, *ranks, f"{key}.jpg", role, "CC0")))
    metadata = folder.with_suffix(".tsv")
    metadata.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return metadata, folder
