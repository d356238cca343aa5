"""Training: the paper's recipe by hand, the same bits after a kill, whatever may be wrong with the data."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

import bioscan
from bioscan.config import layered
from bioscan.errors import DataError, RequestError
from bioscan.learn import model_folder, models, training
from bioscan.learn.augmentation import DRAWS, Augmentation
from bioscan.learn.dataset import ImageSpec, SpecimenDataset
from bioscan.learn.loader import Loader
from bioscan.learn.losses import cross_entropy, focal
from bioscan.learn.run_folder import open_run
from bioscan.learn.settings import RECIPES, TrainSettings

Paint = Callable[..., tuple[Path, Path]]

# with fewer cores than workers torch warns; the results are what is tested
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

THREE = {"Diptera": (10, 4, 2), "Coleoptera": (7, 3, 2), "Lepidoptera": (4, 2, 2)}
QUICK: dict[str, Any] = {
    "model": "test_byobnet",
    "image_size": 36,
    "crop_size": 32,
    "epochs": 2,
    "batch_size": 8,
    "threads": 1,
    "workers": 0,
}


def quick(**changes: Any) -> TrainSettings:
    return TrainSettings(**{**QUICK, **changes})


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def without_seconds(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


# -- the paper's recipe


def test_the_paper_recipe_is_every_default_of_its_program() -> None:
    made = layered(TrainSettings, recipe=RECIPES["paper"])
    reference = {  # flag of the program -> our setting
        "--model resnet50": made.model == "resnet50.tv_in1k",  # torchvision's weights, version 1
        "--pretrained": made.weights == "hub",
        "--image_size 256": made.image_size == 256,
        "--crop_size 224": made.crop_size == 224,
        "RandomCrop": made.crop == "random",
        "RandomHorizontalFlip": made.flip == "horizontal",
        "nothing else": not (made.rotate or made.colour or made.normalise or made.label_smoothing),
        "--n_epochs 100": made.epochs == 100,
        "--batch_size 32": made.batch_size == 32,
        "--lr 1e-3": made.lr == 1e-3,
        "--momentum 0.9": (made.optimizer, made.momentum) == ("sgd", 0.9),
        "--mu 1e-4": made.weight_decay == 1e-4,
        "--epoch_decay 20 25": (made.schedule, made.steps) == ("steps", (20, 25)),
        "--loss CE": made.loss == "cross_entropy",
        "best micro top-1": made.criterion == "micro_top_1",
        "fp32": made.amp == "off",
        "--seed 1": made.seed == 1,
    }
    assert [flag for flag, kept in reference.items() if not kept] == []


def test_the_paper_recipe_trains_as_a_loop_written_by_hand(paint: Paint, tmp_path: Path) -> None:
    metadata, images = paint(THREE)
    dataset = SpecimenDataset.from_catalogue(metadata, images, image_size=36, crop_size=32)
    small = {
        "weights": "none",
        "image_size": 36,
        "crop_size": 32,
        "epochs": 3,
        "steps": (1, 2),
        "batch_size": 8,
    }
    settings = layered(TrainSettings, recipe=RECIPES["paper"] | small | {"criterion": "last", "workers": 0})
    torch.manual_seed(0)
    network, by_hand = (models.create("test_resnet", num_leaves=3, crop_size=32) for _ in range(2))
    by_hand.load_state_dict(network.state_dict())
    spec = training.image_spec_of(settings, network)
    made = training.fit(network, dataset, None, num_leaves=3, spec=spec, settings=settings, folder=tmp_path)

    optimizer = torch.optim.SGD(by_hand.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, nesterov=True)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[1, 2], gamma=0.1)
    by_hand.train()
    flips = 0
    augmentation = Augmentation.of(settings)
    with Loader(dataset, batch_size=8, augmentation=augmentation, seed=1, shuffle=True) as loader:
        for epoch in range(3):
            for batch in loader.epoch(epoch):
                pixels = []
                for image, drawn in zip(batch.images_BCHW, batch.draws_BD, strict=True):
                    flip = bool(drawn[DRAWS.index("horizontal")] < 0.5)
                    flips += flip
                    pixels.append((image.flip(2) if flip else image) / 255)
                loss = functional.cross_entropy(by_hand(torch.stack(pixels)), batch.targets_B)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            scheduler.step()
    assert 0 < flips < 63
    assert same(made.state, by_hand.state_dict())


def test_the_random_crops_of_the_loader_are_parts_of_the_resized_image(paint: Paint) -> None:
    metadata, images = paint({"Diptera": (3, 0, 0), "Coleoptera": (2, 0, 0)})
    dataset = SpecimenDataset.from_catalogue(metadata, images, image_size=36, crop_size=32)
    settings = layered(TrainSettings, recipe=RECIPES["paper"])
    with Loader(dataset, batch_size=5, augmentation=Augmentation.of(settings), shuffle=True) as loader:
        (batch,) = loader.epoch()
    for image, number in zip(batch.images_BCHW, batch.numbers_B.tolist(), strict=True):
        windows = dataset.resized(number).unfold(1, 32, 1).unfold(2, 32, 1)  # every crop there is
        assert bool((windows == image[:, None, None]).flatten(3).all(3).all(0).any())


# -- settings into parts


def test_the_steps_schedule_is_torchs_own() -> None:
    settings = TrainSettings(schedule="steps", steps=(2, 3), lr=0.5)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3])
    for epoch in range(5):
        for part in (0, 0.3, 0.99):
            rate = training.learning_rate(settings, epoch + part)
            assert rate == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        scheduler.step()


def test_the_cosine_warms_up_and_ends_at_zero() -> None:
    settings = TrainSettings(epochs=13, warmup=3, lr=2.0)
    rates = [training.learning_rate(settings, at / 10) for at in range(131)]
    assert rates[0] == pytest.approx(2 * 0.01 / 3)
    assert all(np.diff(rates[:31]) > 0)
    assert rates[30] == 2.0
    assert rates[80] == pytest.approx(1.0)  # half of the ten epochs after the warm-up
    assert all(np.diff(rates[30:]) < 0)
    assert rates[130] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_a_run_shorter_than_its_warm_up_has_rates_above_zero(epochs: int) -> None:
    settings = TrainSettings(epochs=epochs, warmup=5)
    assert all(training.learning_rate(settings, at / 10) > 0 for at in range(epochs * 10))


def test_adamw_spares_biases_and_norms_and_forgets_no_parameter() -> None:
    network = models.create("test_resnet", num_leaves=3, crop_size=32)
    optimizer = training.make_optimizer(network, TrainSettings(weight_decay=0.1))
    decayed, spared = optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    norms = {m for m in network.modules() if isinstance(m, nn.BatchNorm2d)}
    names = {id(p): name for name, p in network.named_parameters()}
    expected = {name for name in names.values() if name.endswith("bias")}
    expected |= {names[id(m.weight)] for m in norms}
    assert {names[id(p)] for p in spared["params"]} == expected
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_the_losses_are_their_formulas() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0]], dtype=torch.float64)
    targets = torch.tensor([0, 1])
    e = [math.exp(2) / (math.exp(2) + 1 + math.exp(-1)), math.exp(0.5) / (2 * math.exp(0.5) + math.exp(3))]
    assert cross_entropy(logits, targets).tolist() == pytest.approx([-math.log(p) for p in e])
    assert focal(logits, targets, gamma=2).tolist() == pytest.approx([(1 - p) ** 2 * -math.log(p) for p in e])
    assert torch.equal(focal(logits, targets, gamma=0), cross_entropy(logits, targets))
    smooth = cross_entropy(logits, targets, label_smoothing=0.3)
    uniform = -functional.log_softmax(logits, 1).mean(1)
    assert torch.allclose(smooth, 0.7 * cross_entropy(logits, targets) + 0.3 * uniform)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 1}, "batch_size is 1; it must be at least 2"),
        ({"min_area": 1.5}, "min_area is 1.5; it must be from 0 to 1"),
        ({"min_area": 0.0}, "min_area is 0.0; it must be above 0"),
        ({"lr": -1.0}, "lr is -1.0; it must be at least 0"),
        ({"lr": 0.0}, "lr is 0.0; it must be above 0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"workers": -1}, "workers is -1; it must be at least 0"),
        ({"epochs": 0}, "epochs is 0; it must be at least 1"),
        ({"label_smoothing": 0.1, "loss": "focal"}, "label_smoothing goes with loss cross_entropy only"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        TrainSettings(**changes)


def test_the_rank_follows_from_the_experiment() -> None:
    assert TrainSettings().target_rank == "order"
    assert TrainSettings(experiment="medium_diptera_family").target_rank == "family"
    assert TrainSettings(experiment="medium_diptera_family", rank="genus").target_rank == "genus"
    assert TrainSettings(experiment="my_own_column").target_rank == "order"


def test_a_device_or_precision_that_is_not_here_is_told() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(RequestError, match="no CUDA device here; pass --device cpu"):
            training.choose_device("cuda")
    with pytest.raises(RequestError, match="fp16 needs a CUDA device"):
        training.choose_precision("fp16", torch.device("cpu"))
    assert training.choose_precision("off", torch.device("cpu")) is None
    assert training.choose_precision("bf16", torch.device("cpu")) is torch.bfloat16


# -- a run


def test_a_run_learns_colours_and_says_what_it_did(paint: Paint, tmp_path: Path) -> None:
    metadata, images = paint(THREE)
    told: list[tuple[int, int, dict[str, Any]]] = []
    result = bioscan.train(
        metadata,
        images,
        tmp_path / "run",
        quick(epochs=12, lr=0.01, amp="off"),
        progress=lambda done, total, **values: told.append((done, total, values)),
    )
    assert result["validation_scores"]["micro_top_1"] == 1.0
    assert (result["classes"], result["training"], result["validation"]) == (3, 21, 9)
    assert (result["failed"], result["left_out"], result["rank"]) == ([], {}, "order")
    assert told[-1][:2] == (12 * 21, 12 * 21)
    assert told[-1][2]["epoch"] == 12
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "failed.csv",
        "history.csv",
        "model",
        "record.json",
        "tensorboard",
    ]
    info = json.loads((tmp_path / "run/model/model.json").read_text())
    assert info["taxonomy"] == json.loads((tmp_path / "run/record.json").read_text())["taxonomy"]
    assert info["settings"]["model"] == "test_byobnet"
    assert (info["experiment"], info["rank"], info["best_epoch"]) == (
        "large_insect_order",
        "order",
        result["best_epoch"],
    )
    assert info["licences"] == ["CC0"]
    names = [node["path"][-1] for node in info["taxonomy"]["nodes"] if node["path"]]
    assert [n for n in names if n not in ("Arthropoda", "Insecta")] == [
        "Diptera",
        "Coleoptera",
        "Lepidoptera",
    ]
    with (tmp_path / "run/history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(r["train_loss"]) for r in rows] == [r["train_loss"] for r in result["history"]]


def test_tensorboard_shows_the_history(paint: Paint, tmp_path: Path) -> None:
    metadata, images = paint(THREE)
    result = bioscan.train(metadata, images, tmp_path / "run", quick())
    curves = read_curves(tmp_path / "run/tensorboard")
    for name in ("train_loss", "validation_macro_top_1", "lr"):
        assert [step for step, _ in curves[name]] == [1, 2]
        wanted = [row[name] for row in result["history"]]
        assert [value for _, value in curves[name]] == pytest.approx(wanted, rel=1e-6)


def read_curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_file_loader import (  # type: ignore[import-untyped]
        LegacyEventFileLoader,
    )

    curves: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.iterdir()):
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                curves.setdefault(value.tag, []).append((event.step, value.simple_value))
    return curves


def test_the_split_hash_is_that_of_the_split_also_within_a_taxon(paint: Paint, tmp_path: Path) -> None:
    from bioscan.analysis.splits import split_hash

    metadata, images = paint({**THREE, "not_classified": (1, 1, 0), "Diptera/Phoridae": (3, 2, 0)})
    frame = bioscan.read_metadata(metadata)
    bioscan.train(metadata, images, tmp_path / "run", quick(epochs=1))
    record = json.loads((tmp_path / "run/record.json").read_text())
    assert record["split_hash"] == split_hash(frame["sampleid"], frame["large_insect_order"])


def test_within_a_taxon_only_its_species_are_classes(paint: Paint, tmp_path: Path) -> None:
    metadata, images = paint(
        {
            "Lepidoptera/Nymphalidae/Vanessa/Vanessa atalanta": (5, 2, 1),
            "Diptera/Syrphidae/Eristalis/Eristalis tenax": (5, 2, 1),
            "Lepidoptera/Nymphalidae/Aglais/Aglais io": (4, 1, 1),
            "Lepidoptera": (3, 1, 0),
        }
    )
    result = bioscan.train(
        metadata, images, tmp_path / "run", quick(within="Lepidoptera", rank="species", epochs=1)
    )
    assert (result["classes"], result["training"], result["validation"]) == (2, 9, 3)
    assert result["left_out"] == {"no name at rank species": 4}
    taxonomy = model_folder.load(tmp_path / "run").taxonomy
    assert [path[-1] for path in taxonomy.leaf_paths] == ["Vanessa atalanta", "Aglais io"]


class Dropping(nn.Sequential):
    """A network whose training draws random numbers."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 5, 4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8 * 7 * 7, 3)
        )


def fit(dataset: SpecimenDataset, folder: Path, settings: TrainSettings, **options: Any) -> training.Result:
    folder.mkdir(exist_ok=True)
    torch.manual_seed(settings.seed)
    spec = ImageSpec(image_size=36, crop_size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    return training.fit(
        Dropping(), dataset, dataset, num_leaves=3, spec=spec, settings=settings, folder=folder, **options
    )


def test_the_seed_decides_and_workers_and_cache_do_not(paint: Paint, tmp_path: Path) -> None:
    metadata, images = paint(THREE)
    plain, cached = (
        SpecimenDataset.from_catalogue(metadata, images, image_size=36, crop_size=32, cache=cache)
        for cache in (False, True)
    )
    one = fit(plain, tmp_path / "one", quick())
    for name, dataset, changes in (
        ("again", plain, {}),
        ("cached", cached, {}),
        ("worker", plain, {"workers": 1}),
        ("workers", plain, {"workers": 2}),
    ):
        other = fit(dataset, tmp_path / name, quick(**changes))
        assert same(one.state, other.state), name
        assert without_seconds(one.run.history) == without_seconds(other.run.history)
    assert not same(one.state, fit(plain, tmp_path / "seed", quick(seed=2)).state)


@pytest.mark.parametrize("criterion", ["macro_top_1", "micro_top_1", "loss", "last"])
def test_the_kept_epoch_is_the_first_best_by_the_criterion(
    paint: Paint, tmp_path: Path, criterion: str
) -> None:
    dataset = SpecimenDataset.from_catalogue(*paint(THREE), image_size=36, crop_size=32)
    run = fit(dataset, tmp_path / "run", quick(epochs=6, lr=0.02, criterion=criterion)).run
    values = [row.get(f"validation_{criterion}", row["epoch"]) for row in run.history]
    best = min(values) if criterion == "loss" else max(values)
    assert run.best_epoch == values.index(best) + 1


def test_macro_top_1_is_the_mean_over_classes_that_validation_has(paint: Paint, tmp_path: Path) -> None:
    metadata, images = paint({"Diptera": (6, 3, 0), "Coleoptera": (6, 0, 0), "Lepidoptera": (6, 1, 0)})
    result = bioscan.train(metadata, images, tmp_path / "run", quick(epochs=3))
    for row in result["history"]:
        # right of 3 Diptera and of 1 Lepidoptera: a and b
        pairs = [
            (a, b)
            for a in range(4)
            for b in range(2)
            if (a + b) / 4 == row["validation_micro_top_1"]
            and (a / 3 + b) / 2 == pytest.approx(row["validation_macro_top_1"])
        ]
        assert len(pairs) == 1


def test_early_stop_after_patience_epochs_without_a_better_one(paint: Paint, tmp_path: Path) -> None:
    dataset = SpecimenDataset.from_catalogue(*paint(THREE), image_size=36, crop_size=32)
    run = fit(dataset, tmp_path / "run", quick(epochs=40, lr=0.01, patience=3)).run
    assert run.epoch == run.best_epoch + 3 < 40
    never = fit(dataset, tmp_path / "never", quick(epochs=12, lr=0.01, patience=0)).run
    assert never.epoch == 12


def test_mixed_precision_and_focal_loss_and_sgd_train_too(paint: Paint, tmp_path: Path) -> None:
    dataset = SpecimenDataset.from_catalogue(*paint(THREE), image_size=36, crop_size=32)
    for name, changes in (
        ("bf16", {"amp": "bf16"}),
        ("focal", {"loss": "focal"}),
        ("sgd", {"optimizer": "sgd", "lr": 0.05}),
        ("smooth", {"label_smoothing": 0.1, "channels_last": False}),
    ):
        history = fit(dataset, tmp_path / name, quick(epochs=10, **changes)).run.history
        assert history[-1]["train_loss"] < history[0]["train_loss"], name


# -- kills

CHILD = """
import os, signal, sys
import torch
import bioscan
from bioscan.learn import run_folder

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def progress(done, total, **values):
    if sys.argv[4] == "middle" and values["epoch"] == 3:
        die()

def after(function, place, times):
    calls = []
    def wrapped(*arguments, **options):
        calls.append(1)
        if len(calls) == times and place == "before":
            die()
        made = function(*arguments, **options)
        if len(calls) == times:
            die()
        return made
    return wrapped

if sys.argv[4] == "checkpoint":    # best weights of epoch 2 are written, its checkpoint is not
    torch.save = after(torch.save, "before", 2)
if sys.argv[4] == "half":          # the second checkpoint lies in its temporary file
    torch.save = after(torch.save, "after", 2)
if sys.argv[4] == "end":           # all epochs done, no model yet
    run_folder.best_state = after(run_folder.best_state, "before", 1)

settings = bioscan.TrainSettings(
    model="test_byobnet", image_size=36, crop_size=32, epochs=4, batch_size=2, threads=1,
    workers=int(sys.argv[5]),
)
bioscan.train(sys.argv[1], sys.argv[2], sys.argv[3], settings, progress=progress)
"""
CHILD_SETTINGS = {**QUICK, "epochs": 4, "batch_size": 2}


@pytest.fixture(scope="module")
def forty(paint: Paint) -> tuple[Path, Path]:
    """More than sixteen batches an epoch, one image broken, a colour that is not learned at once."""
    metadata, images = paint({"Diptera": (20, 4, 2), "Coleoptera": (14, 3, 2), "Lepidoptera": (6, 2, 2)})
    (images / "Diptera-train-5.jpg").write_bytes(b"broken")
    return metadata, images


@pytest.fixture(scope="module")
def whole(forty: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, bioscan.train(*forty, folder, TrainSettings(**CHILD_SETTINGS))


@pytest.mark.parametrize(
    ("moment", "workers", "epochs_kept"),
    [("middle", 0, 2), ("middle", 2, 2), ("checkpoint", 0, 1), ("half", 0, 1), ("end", 0, 4)],
)
def test_a_run_killed_at_any_moment_ends_with_the_bits_of_one_that_was_not(
    forty: tuple[Path, Path],
    whole: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    moment: str,
    workers: int,
    epochs_kept: int,
) -> None:
    whole_folder, expected = whole
    killed = tmp_path / "killed"
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, *map(str, forty), str(killed), moment, str(workers)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert not (killed / "model").exists()
    with pytest.raises(
        RequestError, match=f"holds a run that stopped after {epochs_kept} epochs; pass --res"
    ):
        bioscan.train(*forty, killed, TrainSettings(**CHILD_SETTINGS))
    resumed = bioscan.train(*forty, killed, TrainSettings(**CHILD_SETTINGS), resume=True)
    assert same(weights(killed), weights(whole_folder))
    assert without_seconds(resumed["history"]) == without_seconds(expected["history"])
    assert resumed["best_epoch"] == expected["best_epoch"]
    assert resumed["failed"] == expected["failed"]
    assert [row["image_file"] for row in resumed["failed"]] == ["Diptera-train-5.jpg"]
    with (killed / "history.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2", "3", "4"]
    steps = [step for step, _ in read_curves(killed / "tensorboard")["train_loss"]]
    assert steps == [1, 2, 3, 4]
    left = {p.name for p in killed.iterdir() if not p.name.endswith(".partial")}
    assert left == {"failed.csv", "history.csv", "model", "record.json", "tensorboard"}


def test_random_numbers_of_the_network_go_on_too(paint: Paint, tmp_path: Path) -> None:
    dataset = SpecimenDataset.from_catalogue(*paint(THREE), image_size=36, crop_size=32)
    settings = quick(epochs=5)

    def stop(done: int, total: int, *, epoch: int, loss: float) -> None:
        if epoch == 4:
            raise KeyboardInterrupt

    whole = fit(dataset, tmp_path / "whole", settings)
    with pytest.raises(KeyboardInterrupt):
        fit(dataset, tmp_path / "cut", settings, progress=stop)
    torch.rand(7)
    assert same(fit(dataset, tmp_path / "cut", settings, resume=True).state, whole.state)


def test_a_run_is_resumed_only_as_the_run_that_it_was(forty: tuple[Path, Path], tmp_path: Path) -> None:
    folder, settings = tmp_path / "run", TrainSettings(**CHILD_SETTINGS)

    class Stop(Exception):
        pass

    def stop(done: int, total: int, **values: Any) -> None:
        if values["epoch"] == 2:
            raise Stop

    with pytest.raises(Stop):
        bioscan.train(*forty, folder, settings, progress=stop)
    with pytest.raises(RequestError, match=r"other settings or data: lr was 0\.001, is 0\.5"):
        bioscan.train(*forty, folder, replace(settings, lr=0.5), resume=True)
    with pytest.raises(RequestError, match="--resume goes on with a run, --overwrite throws it away"):
        bioscan.train(*forty, folder, settings, resume=True, overwrite=True)
    metadata = forty[0].with_name("changed.tsv")
    metadata.write_text(forty[0].read_text().replace("Diptera-train-0\t", "Diptera-train-X\t"))
    with pytest.raises(RequestError, match="data_fingerprint; split_hash"):
        bioscan.train(metadata, forty[1], folder, settings, resume=True)
    gone = forty[1] / "Lepidoptera-train-1.jpg"
    gone.rename(tmp_path / "gone.jpg")  # the numbers of the taxa could be others now
    with pytest.raises(RequestError, match="other settings or data: taxonomy"):
        bioscan.train(*forty, folder, settings, resume=True)
    (tmp_path / "gone.jpg").rename(gone)
    with pytest.raises(RequestError, match="holds no run to resume"):
        bioscan.train(*forty, tmp_path / "none", settings, resume=True)
    changed = replace(settings, workers=1, cache_mb=0, patience=50)
    assert bioscan.train(*forty, folder, changed, resume=True)["epochs"] == 4
    for resume in (False, True):
        with pytest.raises(RequestError, match="holds a finished run; choose another --output"):
            bioscan.train(*forty, folder, settings, resume=resume)
    again = bioscan.train(*forty, folder, replace(settings, epochs=1), overwrite=True)
    assert again["epochs"] == 1


def test_a_damaged_checkpoint_is_told(tmp_path: Path) -> None:
    open_run(tmp_path / "run", {"settings": {}}, resume=False, overwrite=False)
    (tmp_path / "run/checkpoint.pt").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(DataError, match=r"checkpoint\.pt: cannot be read"):
        open_run(tmp_path / "run", {"settings": {}}, resume=False, overwrite=False)


def test_a_folder_that_is_no_run_is_never_touched(paint: Paint, tmp_path: Path) -> None:
    place = tmp_path / "thesis"
    place.mkdir()
    (place / "chapter1.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(RequestError, match="exists and is no run folder; choose another --output"):
            bioscan.train(*paint(THREE), place, quick(), overwrite=overwrite)
    assert (place / "chapter1.tex").read_text() == "years of work"


# -- whatever may be wrong with the data


def test_images_that_are_broken_or_absent_are_listed_and_the_rest_is_learned(
    paint: Paint, tmp_path: Path
) -> None:
    metadata, images = paint(THREE)
    (images / "Diptera-train-2.jpg").write_bytes(b"")
    (images / "Coleoptera-validation-1.jpg").write_bytes((images / "Diptera-train-1.jpg").read_bytes()[:400])
    (images / "Lepidoptera-train-0.jpg").unlink()
    (images / "Lepidoptera-test-0.jpg").unlink()  # of no concern to training
    result = bioscan.train(metadata, images, tmp_path / "run", quick())
    listed = {row["key"]: row["error"] for row in result["failed"]}
    assert listed.keys() == {"Diptera-train-2", "Coleoptera-validation-1", "Lepidoptera-train-0"}
    assert listed["Lepidoptera-train-0"] == "not in the package"
    assert listed["Diptera-train-2"].startswith("empty file")
    assert listed["Coleoptera-validation-1"].startswith("truncated JPEG")
    with (tmp_path / "run/failed.csv").open() as file:
        assert list(csv.DictReader(file)) == result["failed"]
    assert (result["training"], result["validation"]) == (20, 9)


@pytest.mark.parametrize(
    ("counts", "batch_size"),
    [
        ({"Diptera": (3, 1, 0), "Coleoptera": (2, 1, 0)}, 64),  # one batch an epoch
        ({"Diptera": (3, 1, 0), "Coleoptera": (2, 1, 0)}, 4),  # a last batch of one
        ({"Diptera": (8, 1, 0), "Coleoptera": (1, 0, 0)}, 4),  # a class with one specimen
        ({"Diptera": (1, 1, 0), "Coleoptera": (1, 1, 0)}, 2),  # two specimens
    ],
)
def test_small_and_odd_epochs_train(
    paint: Paint, tmp_path: Path, counts: dict[str, tuple[int, int, int]], batch_size: int
) -> None:
    result = bioscan.train(*paint(counts), tmp_path / "run", quick(batch_size=batch_size))
    assert all(math.isfinite(row["train_loss"]) for row in result["history"])
    assert result["classes"] == 2


def test_a_batch_that_failures_leave_one_specimen_of_is_passed_over(paint: Paint, tmp_path: Path) -> None:
    metadata, images = paint({"Diptera": (3, 1, 0), "Coleoptera": (1, 1, 0)})
    (images / "Diptera-train-0.jpg").write_bytes(b"")
    result = bioscan.train(metadata, images, tmp_path / "run", quick(batch_size=2, epochs=3))
    assert len(result["history"]) == 3  # one of the two batches holds one picture
    assert all(math.isfinite(row["train_loss"]) for row in result["history"])


def test_without_validation_the_last_epoch_can_be_kept(paint: Paint, tmp_path: Path) -> None:
    metadata, images = paint({"Diptera": (4, 0, 1), "Coleoptera": (4, 0, 1)})
    with pytest.raises(RequestError, match=r"has no validation specimens .*pass --criterion last"):
        bioscan.train(metadata, images, tmp_path / "run", quick())
    assert not (tmp_path / "run").exists()
    result = bioscan.train(metadata, images, tmp_path / "run", quick(criterion="last"))
    assert result["best_epoch"] == 2
    assert set(result["validation_scores"].values()) == {None}
    assert "there were no validation specimens" in (tmp_path / "run/model/README.md").read_text()


@pytest.mark.parametrize(
    ("counts", "changes", "message"),
    [
        ({"Diptera": (4, 1, 0)}, {}, "all training specimens are Diptera: there is nothing to tell apart"),
        ({"Diptera": (0, 3, 1)}, {}, "has no training specimens with an image and a name at rank order"),
        (THREE, {"experiment": "small_insect_order"}, "has no column 'small_insect_order'"),
        (THREE, {"rank": "ordr"}, "unknown rank 'ordr'"),
        (THREE, {"within": "Nobody"}, "no record belongs to 'Nobody'"),
        (THREE, {"model": "resnt18"}, "unknown model 'resnt18'; did you mean 'resnet18'"),
        (THREE, {"amp": "fp16", "device": "cpu"}, "fp16 needs a CUDA device"),
        (THREE, {"weights": "nowhere.pth"}, "nowhere.pth: no such weights file"),
    ],
)
def test_a_run_that_cannot_be_leaves_nothing_behind(
    paint: Paint, tmp_path: Path, counts: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        bioscan.train(*paint(counts), tmp_path / "run", quick(**changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("role", ["train", "validation"])
def test_a_part_of_which_no_image_can_be_read_ends_the_run(paint: Paint, tmp_path: Path, role: str) -> None:
    metadata, images = paint(THREE)
    for path in images.glob(f"*-{role}-*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"images can.* be read; first: empty file"):
        bioscan.train(metadata, images, tmp_path / "run", quick())
    assert not (tmp_path / "run/model").exists()


def test_a_loss_that_is_no_number_ends_the_run_with_advice(paint: Paint, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the loss became (nan|inf) in epoch \d; a lower --lr usually helps"):
        bioscan.train(*paint(THREE), tmp_path / "run", quick(lr=1e30, epochs=5, optimizer="sgd", warmup=0))
    assert not (tmp_path / "run/model").exists()


def test_a_disk_that_is_full_leaves_no_half_model(
    paint: Paint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, history: Any) -> None:
        path.write_text("epo")
        raise OSError(28, "No space left on device", str(path))

    settings = quick()
    metadata, images = paint(THREE)
    monkeypatch.setattr(model_folder, "write_history", full)
    with pytest.raises(RequestError, match="No space left on device; nothing was written"):
        bioscan.train(metadata, images, tmp_path / "run", settings)
    assert not (tmp_path / "run/model").exists()
    monkeypatch.undo()
    assert bioscan.train(metadata, images, tmp_path / "run", settings, resume=True)["epochs"] == 2


def test_numbers_of_the_specimens_do_not_follow_from_row_order(paint: Paint, tmp_path: Path) -> None:
    """Class numbers follow from counts, so they are the same whatever the order of the file."""
    metadata, images = paint(THREE)
    header, *rows = metadata.read_text().splitlines()
    shuffled = metadata.with_name("shuffled.tsv")
    order = np.random.default_rng(0).permutation(len(rows))
    shuffled.write_text("\n".join([header, *(rows[i] for i in order)]) + "\n")
    made = [
        SpecimenDataset.from_catalogue(m, images, image_size=36, crop_size=32) for m in (metadata, shuffled)
    ]
    assert made[0].classes == made[1].classes == ["Diptera", "Coleoptera", "Lepidoptera"]
