"""Training: the paper's recipe by hand, the same bits after a kill, whatever may be wrong with the data."""

import csv
import json
import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

import bioscan
from bioscan.analysis.taxonomy import Taxonomy
from bioscan.config import layered
from bioscan.data.images import Images
from bioscan.errors import DataError, RequestError
from bioscan.jobs.evaluate import evaluate_ranks
from bioscan.jobs.predict import predict
from bioscan.learn import model_folder, models, run_folder, training
from bioscan.learn.augmentation import DRAWS, Augmentation
from bioscan.learn.dataset import ImageSpec, SpecimenDataset
from bioscan.learn.device import choose_device, choose_precision
from bioscan.learn.distributed import ONE
from bioscan.learn.loader import Batch, Loader
from bioscan.learn.losses import make_loss, outputs_of
from bioscan.learn.optimisation import learning_rate, make_optimizer, set_rate
from bioscan.learn.run_folder import open_run
from bioscan.learn.settings import RECIPES, TrainSettings
from bioscan.learn.specimens import Specimens, select
from bioscan.learn.validation import score_names, validate
from bioscan.vocabulary import RANKS

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


def part(
    metadata: Path, images: Path, *, ranks: tuple[str, ...] = ("order",), cache: bool = False
) -> tuple[SpecimenDataset, Specimens]:
    """The training specimens, their targets nodes of the taxonomy."""
    package = Images(images)
    chosen = select(metadata, package, experiment="large_insect_order", ranks=ranks, roles=["train"])
    rows, nodes = (chosen.table[column].to_numpy() for column in ("row", "node"))
    return SpecimenDataset(package, rows, nodes, image_size=36, crop_size=32, cache=cache), chosen


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
    dataset, chosen = part(*paint(THREE))
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
    network, by_hand = (models.create("test_resnet", outputs=3, crop_size=32) for _ in range(2))
    by_hand.load_state_dict(network.state_dict())
    spec = training.image_spec_of(settings, network)
    made = training.fit(
        network,
        dataset,
        None,
        taxonomy=chosen.taxonomy,
        loss=make_loss(settings, chosen.taxonomy, chosen.target_counts()),
        spec=spec,
        settings=settings,
        folder=tmp_path,
    )

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
                loss = functional.cross_entropy(
                    by_hand(torch.stack(pixels)), batch.targets_B - 1
                )  # less the root
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
            rate = learning_rate(settings, epoch + part)
            assert rate == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        scheduler.step()


def test_the_cosine_warms_up_and_ends_at_zero() -> None:
    settings = TrainSettings(epochs=13, warmup=3, lr=2.0)
    rates = [learning_rate(settings, at / 10) for at in range(131)]
    assert rates[0] == pytest.approx(2 * 0.01 / 3)
    assert all(np.diff(rates[:31]) > 0)
    assert rates[30] == 2.0
    assert rates[80] == pytest.approx(1.0)  # half of the ten epochs after the warm-up
    assert all(np.diff(rates[30:]) < 0)
    assert rates[130] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_a_run_shorter_than_its_warm_up_has_rates_above_zero(epochs: int) -> None:
    settings = TrainSettings(epochs=epochs, warmup=5)
    assert all(learning_rate(settings, at / 10) > 0 for at in range(epochs * 10))


def test_adamw_spares_biases_and_norms_and_forgets_no_parameter() -> None:
    network = models.create("test_resnet", outputs=3, crop_size=32)
    optimizer = make_optimizer(network, TrainSettings(weight_decay=0.1))
    decayed, spared = optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    norms = {m for m in network.modules() if isinstance(m, nn.BatchNorm2d)}
    names = {id(p): name for name, p in network.named_parameters()}
    expected = {name for name in names.values() if name.endswith("bias")}
    expected |= {names[id(m.weight)] for m in norms}
    assert {names[id(p)] for p in spared["params"]} == expected
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 1}, "batch_size is 1; it must be at least 2"),
        ({"min_area": 1.5}, "min_area is 1.5; it must be from 0 to 1"),
        ({"min_area": 0.0}, "min_area is 0.0; it must be above 0"),
        ({"lr": -1.0}, "lr is -1.0; it must be at least 0"),
        ({"lr": 0.0}, "lr is 0.0; it must be above 0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0; it must be above 0"),
        ({"layer_decay": 0.0}, "layer_decay is 0.0; it must be above 0"),
        ({"workers": -1}, "workers is -1; it must be at least 0"),
        ({"epochs": 0}, "epochs is 0; it must be at least 1"),
        ({"label_smoothing": 0.1, "loss": "focal"}, "label_smoothing goes with loss cross_entropy only"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        TrainSettings(**changes)


def test_the_ranks_follow_from_the_experiment_unless_they_are_told() -> None:
    assert TrainSettings().target_ranks == ("order",)
    assert TrainSettings(experiment="medium_diptera_family").target_ranks == ("family",)
    assert TrainSettings(experiment="medium_diptera_family", rank="genus").target_ranks == ("genus",)
    assert TrainSettings(experiment="my_own_column").target_ranks == ("order",)
    assert TrainSettings(ranks=("genus,order", "species")).target_ranks == ("order", "genus", "species")


def test_a_device_or_precision_that_is_not_here_is_told() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(RequestError, match="no CUDA device here; pass --device cpu"):
            choose_device("cuda")
    with pytest.raises(RequestError, match="fp16 needs a CUDA device"):
        choose_precision("fp16", torch.device("cpu"))
    assert choose_precision("off", torch.device("cpu")) is None
    assert choose_precision("bf16", torch.device("cpu")) is torch.bfloat16


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

    def __init__(self, outputs: int = 3) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 5, 4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8 * 7 * 7, outputs)
        )


def fit(
    learned: tuple[SpecimenDataset, Specimens], folder: Path, settings: TrainSettings, **options: Any
) -> training.Result:
    """A run on one part, which is its own validation."""
    dataset, chosen = learned
    folder.mkdir(exist_ok=True)
    torch.manual_seed(settings.seed)
    return training.fit(
        Dropping(outputs_of(chosen.taxonomy, settings.softmax)),
        dataset,
        dataset,
        taxonomy=chosen.taxonomy,
        loss=make_loss(settings, chosen.taxonomy, chosen.target_counts()),
        spec=ImageSpec(image_size=36, crop_size=32, mean=(0.5,) * 3, std=(0.5,) * 3),
        settings=settings,
        folder=folder,
        **options,
    )


def test_the_seed_decides_and_workers_and_cache_do_not(paint: Paint, tmp_path: Path) -> None:
    metadata, images = paint(THREE)
    plain, cached = (part(metadata, images, cache=cache) for cache in (False, True))
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
    dataset = part(*paint(THREE))
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
    dataset = part(*paint(THREE))
    run = fit(dataset, tmp_path / "run", quick(epochs=40, lr=0.01, patience=3)).run
    assert run.epoch == run.best_epoch + 3 < 40
    never = fit(dataset, tmp_path / "never", quick(epochs=12, lr=0.01, patience=0)).run
    assert never.epoch == 12


def test_mixed_precision_and_focal_loss_and_sgd_train_too(paint: Paint, tmp_path: Path) -> None:
    dataset = part(*paint(THREE))
    for name, changes in (
        ("bf16", {"amp": "bf16"}),
        ("focal", {"loss": "focal"}),
        ("sgd", {"optimizer": "sgd", "lr": 0.05}),
        ("smooth", {"label_smoothing": 0.1, "channels_last": False}),
    ):
        history = fit(dataset, tmp_path / name, quick(epochs=10, **changes)).run.history
        assert history[-1]["train_loss"] < history[0]["train_loss"], name


# -- several ranks


DEEP = {
    "Diptera/Syrphidae/Eristalis/Eristalis tenax": (6, 3, 1),
    "Diptera/Syrphidae": (6, 2, 0),
    "Lepidoptera/not_classified/Pieris": (5, 2, 1),
    "Lepidoptera": (3, 1, 0),
    "Coleoptera/Carabidae/Carabus/Carabus auratus": (4, 0, 1),
}


@pytest.mark.parametrize("ranks", [("order",), ("order", "family", "genus"), ("family", "species")])
def test_accuracies_at_each_rank_are_those_counted_one_by_one(ranks: tuple[str, ...]) -> None:
    generator = np.random.default_rng(3)
    rows = [(*path.split("/"), *["not_classified"] * 3)[:4] for path in DEEP]
    frame = pl.DataFrame(
        [[None if name == "not_classified" else name for name in row] for row in rows],
        schema=["order", "family", "genus", "species"],
        orient="row",
    )
    taxonomy = Taxonomy.build(frame.filter(pl.any_horizontal(pl.col(r).is_not_null() for r in ranks)), ranks)
    taxonomy, _ = taxonomy.filled()
    real = np.flatnonzero(taxonomy.predictable_N[1:]) + 1
    targets = generator.choice(real, 60)
    leaves = generator.integers(0, taxonomy.num_leaves, 60)
    places = np.where(np.arange(60) < 50, np.arange(60), -1)  # the last ten count for nothing

    def batch_of(span: slice) -> Batch:
        numbers = torch.arange(60)[span]
        image, drawn = torch.zeros(numbers.numel(), 3, 1, 1), torch.zeros(numbers.numel(), len(DRAWS))
        at = torch.from_numpy(places[span])
        return Batch(image, torch.from_numpy(targets[span]), numbers, drawn, at, [])

    def measure(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        taken = batch.numbers_B % 2 == 0
        return torch.from_numpy(leaves)[batch.numbers_B], batch.numbers_B * taken, taken

    batches = [batch_of(slice(0, 30)), batch_of(slice(30, 50)), batch_of(slice(50, 60))]
    scores, failures = validate(batches, measure, taxonomy, ONE)
    assert failures == {}
    assert scores["validation_loss"] == 24  # of the even numbers up to 48

    def name_at(node: int, rank: str) -> str | None:
        while node > 0:
            if RANKS[taxonomy.rank_N[node]] == rank:
                return taxonomy.name(node) if taxonomy.predictable_N[node] else None
            node = int(taxonomy.parent_N[node])
        return None

    means: dict[str, list[float]] = {"micro": [], "macro": []}
    for rank in ranks:
        true = [name_at(int(node), rank) for node in targets[:50]]
        found = [name_at(int(taxonomy.leaves_L[leaf]), rank) for leaf in leaves[:50]]
        right: dict[str, list[bool]] = {}
        for one, other in zip(true, found, strict=True):
            if one is not None:
                right.setdefault(one, []).append(one == other)
        every = [r for of_taxon in right.values() for r in of_taxon]
        means["micro"].append(sum(every) / len(every))
        means["macro"].append(sum(sum(r) / len(r) for r in right.values()) / len(right))
        if len(ranks) > 1:
            for kind, values in means.items():
                assert scores[f"validation_{rank}_{kind}_top_1"] == pytest.approx(values[-1], abs=1e-12)
    for kind, values in means.items():
        assert scores[f"validation_{kind}_top_1"] == pytest.approx(sum(values) / len(ranks), abs=1e-12)
    assert list(scores) == score_names(taxonomy)


def test_one_model_learns_all_ranks_also_from_partly_named_specimens(paint: Paint, tmp_path: Path) -> None:
    settings = quick(ranks=("order,family,genus,species",), epochs=25, lr=0.01, amp="off")
    result = bioscan.train(*paint(DEEP), tmp_path / "run", settings)
    assert (result["ranks"], result["rank"]) == (["order", "family", "genus", "species"], "species")
    assert (result["classes"], result["placeholders"], result["coarse"]) == (3, 1, 9)
    scores = result["validation_scores"]
    assert scores["order_micro_top_1"] == 1.0
    known = [scores[f"{rank}_macro_top_1"] for rank in result["ranks"]]
    assert scores["macro_top_1"] == pytest.approx(sum(known) / 4)
    model = model_folder.load(tmp_path / "run")
    assert model.info["target_counts"] == model.target_counts_N.tolist()
    assert sum(model.info["target_counts"]) == 24
    assert (model.info["ranks"], model.softmax) == (["order", "family", "genus", "species"], "flat")


@pytest.mark.parametrize("coarse", ["refuse", "drop"])
def test_a_loss_that_needs_leaves_says_so_or_drops(paint: Paint, tmp_path: Path, coarse: str) -> None:
    settings = quick(ranks=("order,species",), loss="focal", coarse=coarse)
    if coarse == "refuse":
        with pytest.raises(RequestError, match=r"are not named down to a leaf .* or --coarse drop"):
            bioscan.train(*paint(DEEP), tmp_path / "run", settings)
        assert not (tmp_path / "run").exists()
        return
    result = bioscan.train(*paint(DEEP), tmp_path / "run", settings)
    # of the 24 six are Diptera without a species; those of Lepidoptera are all the same leaf
    assert (result["training"], result["coarse"]) == (18, 0)
    assert result["left_out"] == {"a name above the leaves of the tree, which the loss cannot take": 6}


def test_the_kept_weights_are_those_that_were_validated(paint: Paint, tmp_path: Path) -> None:
    learned = part(*paint(DEEP), ranks=("order", "species"))
    dataset, chosen = learned
    cases: dict[str, dict[str, Any]] = {
        "mean": {"ema": 0.8},
        "spread": {"ema": 0.8, "distribute": "fsdp"},
        "conditional": {"softmax": "conditional"},
    }
    for name, changes in cases.items():
        settings = quick(epochs=3, amp="off", criterion="last", **changes)
        result = fit(learned, tmp_path / name, settings)
        network = Dropping(outputs_of(chosen.taxonomy, settings.softmax)).eval()
        network.load_state_dict(result.state)
        images = torch.stack([dataset[i][0] for i in range(len(dataset))])
        targets = torch.tensor(dataset.targets_N)
        with torch.no_grad():
            outputs = network((images.float() / 255 - 0.5) / 0.5)
            loss = make_loss(settings, chosen.taxonomy, chosen.target_counts())(outputs, targets)
        assert result.run.history[-1]["validation_loss"] == pytest.approx(float(loss.mean()), rel=1e-5)


SCORED: dict[str, dict[str, Any]] = {
    "mean": {"ema": 0.8, "mixup": 0.3},
    "conditional": {"softmax": "conditional", "sampler": "square_root"},
    "adapted": {
        **{"model": "test_vit", "lora_rank": 2, "ema": 0.8, "loss": "logit_adjusted"},
        **{"optimizer": "sgd", "layer_decay": 0.8, "lr": 0.1},
    },
}
UNKNOWN = "Diptera/Syrphidae/Episyrphus/Episyrphus balteatus"


@pytest.mark.parametrize("name", SCORED)
def test_scores_of_the_history_are_those_of_an_evaluation(paint: Paint, tmp_path: Path, name: str) -> None:
    ranks = ("order", "family", "genus", "species")
    data = paint({**DEEP, UNKNOWN: (0, 2, 0)})  # known to their family
    settings = quick(epochs=4, ranks=ranks, **{"amp": "off", "lr": 0.01, **SCORED[name]})
    result = bioscan.train(*data, tmp_path / "run", settings)
    assert result["lifted"] == 2
    made = tmp_path / "named.parquet"
    predict(tmp_path / "run", data[0], made, images=data[1], roles=["validation"])
    found = evaluate_ranks(made, data[0], role="validation")
    assert [*found] == [*ranks]
    for rank, evaluation in found.items():
        unknown = 2 if rank in ("genus", "species") else 0
        assert evaluation.counts["unknown_to_model"] == unknown
        micro, macro = (evaluation.metrics["top_1"][average] for average in ("micro", "macro"))
        scores = [result["validation_scores"][f"{rank}_{kind}_top_1"] for kind in ("micro", "macro")]
        # an evaluation counts taxa that the model cannot know as errors
        n, classes = evaluation.n, macro.classes or 0
        assert scores[0] == pytest.approx(micro.value * n / (n - unknown))
        assert scores[1] == pytest.approx(macro.value * classes / (classes - unknown // 2))


def test_a_loss_that_changes_on_the_way_is_validated_as_it_ends(paint: Paint, tmp_path: Path) -> None:
    """Else an epoch would look better for the weights that its loss had not yet."""
    losses = []
    for deferred in (0.0, 1.0):
        settings = quick(loss="ldam", ldam_deferred=deferred, epochs=1, lr=1e-9, amp="off", balance_beta=1.0)
        result = bioscan.train(*paint(THREE), tmp_path / str(deferred), settings)
        losses.append(result["history"][0]["validation_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# -- what a step does


def test_the_gradient_of_a_step_is_clipped(paint: Paint, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "schedule": "steps"}
    settings = quick(batch_size=21, epochs=1, lr=0.5, amp="off", criterion="last", **changes)
    torch.manual_seed(settings.seed)
    start = Dropping().state_dict()

    def moved(name: str, settings: TrainSettings) -> float:
        end = fit(part(*paint(THREE)), tmp_path / name, settings).state
        return math.sqrt(sum(float((end[k] - start[k]).square().sum()) for k in start))

    assert moved("clipped", replace(settings, clip_norm=0.01)) == pytest.approx(0.5 * 0.01, rel=1e-3)
    assert moved("free", settings) > 0.05
    assert moved("wide", replace(settings, clip_norm=1e9)) == pytest.approx(moved("free2", settings))


def test_each_group_has_its_share_of_the_rate() -> None:
    network = models.create("test_vit", outputs=3, crop_size=32)
    optimizer = make_optimizer(network, TrainSettings(layer_decay=0.5))
    set_rate(optimizer, 0.2)
    rates = {group["lr_scale"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {scale: pytest.approx(0.2 * scale) for scale in rates}
    assert len(rates) > 3
    assert max(rates) == 1


def test_what_is_frozen_stays_and_adapters_end_in_an_ordinary_network(paint: Paint, tmp_path: Path) -> None:
    data = paint(THREE)
    torch.manual_seed(1)
    start = models.create("test_byobnet", outputs=3, crop_size=32).state_dict()
    bioscan.train(*data, tmp_path / "frozen", quick(freeze=True))
    end = weights(tmp_path / "frozen")
    assert {name for name in start if not torch.equal(start[name], end[name])} == {
        "head.fc.weight",
        "head.fc.bias",
    }
    bioscan.train(*data, tmp_path / "adapted", quick(model="test_vit", lora_rank=2, lr=0.01))
    torch.manual_seed(1)
    start = models.create("test_vit", outputs=3, crop_size=32).state_dict()
    end = weights(tmp_path / "adapted")
    assert end.keys() == start.keys()
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert moved >= {"head.weight", "blocks.0.attn.qkv.weight"}
    assert all(name.startswith("head.") or ".attn." in name for name in moved)
    assert model_folder.load(tmp_path / "adapted").taxonomy.num_leaves == 3


def test_every_loss_and_sampler_trains_and_its_model_loads(paint: Paint, tmp_path: Path) -> None:
    data = paint(THREE)
    cases: dict[str, dict[str, Any]] = {
        "ldam": {"loss": "ldam", "ldam_deferred": 0.5},
        "class_balanced": {"loss": "class_balanced", "sampler": "square_root"},
        "logit_adjusted": {"loss": "logit_adjusted", "sampler": "class_balanced"},
        "mixed": {"mixup": 0.2, "cutmix": 1.0, "sampler": "repeat_factor", "repeat_threshold": 0.4},
        "random": {"random_ops": 2, "background": 0.5, "label_smoothing": 0.1},
    }
    for name, changes in cases.items():
        result = bioscan.train(*data, tmp_path / name, quick(epochs=8, lr=0.01, **changes))
        losses = [row["train_loss"] for row in result["history"]]
        assert min(losses[1:]) < losses[0], name
        loss = changes.get("loss", "cross_entropy")
        assert model_folder.load(tmp_path / name).trained_with("loss") == loss


@pytest.mark.parametrize("accumulate", [2, 3, 8])
def test_parts_that_hold_one_specimen_or_none_train_too(
    paint: Paint, tmp_path: Path, accumulate: int
) -> None:
    metadata, images = paint({"Diptera": (4, 1, 0), "Coleoptera": (3, 1, 0)})
    (images / "Diptera-train-0.jpg").write_bytes(b"")
    settings = quick(batch_size=4, accumulate=accumulate, model="test_resnet", epochs=3)
    result = bioscan.train(metadata, images, tmp_path / "run", settings)
    assert all(math.isfinite(row["train_loss"]) for row in result["history"])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # of torch's own modules
def test_a_compiled_network_learns_the_same(paint: Paint, tmp_path: Path) -> None:
    dataset = part(*paint(THREE))
    plain, compiled = (
        fit(dataset, tmp_path / str(compile), quick(epochs=1, amp="off", compile=compile)).state
        for compile in (False, True)
    )
    assert plain.keys() == compiled.keys()
    for name, value in plain.items():
        assert torch.allclose(value.float(), compiled[name].float(), rtol=1e-3, atol=1e-4), name


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
    [
        pytest.param("middle", 0, 2, marks=pytest.mark.slow),
        ("middle", 2, 2),
        ("checkpoint", 0, 1),
        pytest.param("half", 0, 1, marks=pytest.mark.slow),
        pytest.param("end", 0, 4, marks=pytest.mark.slow),
    ],
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


@pytest.mark.parametrize("changes", [{}, {"ema": 0.9, "mixup": 0.5, "accumulate": 2}, {"distribute": "fsdp"}])
def test_random_numbers_of_the_network_go_on_too(
    paint: Paint, tmp_path: Path, changes: dict[str, Any]
) -> None:
    dataset = part(*paint(THREE))
    settings = quick(epochs=5, **changes)

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


def test_a_run_goes_on_with_other_threads_only_if_it_may_be_rounded_otherwise(tmp_path: Path) -> None:
    one, two = ({"settings": {"threads": n}, "threads": n, "processes": 1} for n in (1, 2))
    open_run(tmp_path / "run", one, resume=False, overwrite=False)
    with pytest.raises(RequestError, match=r"begun otherwise: threads was 1, is 2; .*or pass --inexact"):
        open_run(tmp_path / "run", two, resume=True, overwrite=False)
    open_run(tmp_path / "run", two, resume=True, overwrite=False, inexact=True)
    other = {**two, "settings": {"threads": 2, "lr": 1}}
    with pytest.raises(RequestError, match=r"other settings or data: lr was None, is 1"):
        open_run(tmp_path / "run", other, resume=True, overwrite=False, inexact=True)


def test_a_folder_in_which_another_process_trains_is_left_to_it(
    paint: Paint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, folder = paint(THREE), tmp_path / "run"
    monkeypatch.setattr(run_folder, "_LINGER_S", 0.3)

    def others(done: int, total: int, **values: Any) -> None:
        for options in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(RequestError, match=r"another process trains in .*run; let it end"):
                bioscan.train(*data, folder, quick(), **options)

    result = bioscan.train(*data, folder, quick(), progress=others)
    assert result["epochs"] == 2
    assert bioscan.train(*data, folder, quick(), overwrite=True)["epochs"] == 2


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
        (DEEP, {"ranks": ("order", "tribe")}, "no training specimen has a name at rank tribe: leave it out"),
        (DEEP, {"ranks": ("order", "subfamily", "genus")}, "has a name at rank subfamily: leave it out"),
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


def test_a_checkpoint_that_does_not_fit_on_the_disk_is_told(paint: Paint, tmp_path: Path) -> None:
    data = paint(THREE)
    bioscan.train(*data, tmp_path / "whole", quick())
    size = (tmp_path / "whole/model/model.safetensors").stat().st_size
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * size, unlimited[1]))  # best weights fit, thrice does not
    try:
        with pytest.raises(RequestError, match=r"checkpoint\.pt: File too large; nothing was written"):
            bioscan.train(*data, tmp_path / "run", quick())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    bioscan.train(*data, tmp_path / "run", quick(), resume=True)
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


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
