"""Several processes that train one network: what one process gives, the same bits after a kill, told once.

Run by torchrun, this file is the program that each process runs; see `main`.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import bioscan
from bioscan.data.images import Images
from bioscan.errors import RequestError
from bioscan.learn import adapters, distributed, models, training
from bioscan.learn.dataset import ImageSpec, SpecimenDataset
from bioscan.learn.distributed import ONE, Processes, joined
from bioscan.learn.losses import make_loss, outputs_of
from bioscan.learn.settings import TrainSettings
from bioscan.learn.specimens import select

Paint = Callable[..., tuple[Path, Path]]

COMMON: dict[str, Any] = {
    "image_size": 36,
    "crop_size": 32,
    "epochs": 2,
    "batch_size": 8,
    "threads": 1,
    "workers": 0,
    "device": "cpu",
    "amp": "off",
}

TREE = {
    "Diptera/Syrphidae/Eristalis/Eristalis tenax": (5, 2, 0),
    "Diptera/Syrphidae": (6, 1, 0),
    "Diptera": (4, 1, 0),
    "Lepidoptera/Nymphalidae/Vanessa/Vanessa atalanta": (5, 1, 0),
    "Lepidoptera/Nymphalidae/Aglais/Aglais io": (4, 2, 0),
    "Lepidoptera//Pieris": (3, 1, 0),
}

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "parts": {"accumulate": 3, "optimizer": "sgd", "lr": 0.05},
    "tree": {"ranks": ["order", "family", "species"], "clip_norm": 0.5, "ema": 0.9},
    "conditional": {"ranks": ["order", "species"], "softmax": "conditional", "sampler": "class_balanced"},
    "mixed": {"seed": 2, "mixup": 0.4, "cutmix": 1.0, "accumulate": 2, "loss": "focal", "random_ops": 2},
    "tiny": {"batch_size": 3, "sampler": "repeat_factor", "repeat_threshold": 0.5},
    "frozen": {"network": "test_resnet", "freeze": True},
    "spread": {"distribute": "fsdp", "accumulate": 2},
    "wide": {"network": "wide", "batch_size": 9},
    "spread_vit": {
        **{"network": "test_vit", "distribute": "fsdp", "clip_norm": 1.0, "ema": 0.9, "layer_decay": 0.8},
    },
}
"""Name -> settings, and the network; all but the wide one in float64."""


IN_FLOAT64 = [name for name in CASES if name != "wide"]


class Wide(nn.Module):
    """So large that three processes sum it in pieces, its layers not in the order that they are used in."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.head, self.second = nn.Linear(640, outputs), nn.Linear(640, 640)
        self.convolution, self.first = nn.Conv2d(3, 8, 5, 4), nn.Linear(8 * 7 * 7, 640)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        hidden = self.first(self.convolution(images_BCHW).flatten(1)).relu()
        logits: Tensor = self.head(self.second(hidden).relu())
        return logits


def network_of(name: str, outputs: int) -> nn.Module:
    if name == "wide":
        return Wide(outputs)
    if name != "plain":
        return models.create(name, outputs=outputs, crop_size=32).double()
    layers = (nn.Conv2d(3, 8, 5, 4), nn.GELU(), nn.Flatten(), nn.Linear(8 * 7 * 7, outputs))
    return nn.Sequential(*layers).double()


def train_case(
    case: Mapping[str, Any], data: Sequence[Path], folder: Path, processes: Processes, **options: Any
) -> training.Result:
    """A run in float64 on the painted data."""
    changes = {name: value for name, value in case.items() if name != "network"}
    settings = TrainSettings(**{**COMMON, "criterion": "last", **changes})
    package = Images(data[1])
    chosen = select(data[0], package, experiment=settings.experiment, ranks=settings.target_ranks)
    datasets = [
        SpecimenDataset(
            package,
            chosen.of(role)["row"].to_numpy(),
            chosen.of(role)["node"].to_numpy(),
            image_size=36,
            crop_size=32,
        )
        for role in ("train", "validation")
    ]
    torch.manual_seed(settings.seed)
    network = network_of(case.get("network", "plain"), outputs_of(chosen.taxonomy, settings.softmax))
    if settings.freeze:
        adapters.freeze_backbone(network)
    folder.mkdir(parents=True, exist_ok=True)
    return training.fit(
        network,
        *datasets,
        taxonomy=chosen.taxonomy,
        loss=make_loss(settings, chosen.taxonomy, chosen.target_counts()),
        spec=ImageSpec(image_size=36, crop_size=32, mean=(0.5,) * 3, std=(0.5,) * 3),
        settings=settings,
        folder=folder,
        processes=processes,
        **options,
    )


RUNS: dict[str, dict[str, Any]] = {
    "ddp": {"model": "test_byobnet"},  # with batch norms: each process has its own
    "fsdp": {
        **{"model": "test_vit", "distribute": "fsdp", "ema": 0.9, "accumulate": 2, "mixup": 0.2},
        "layer_decay": 0.8,
    },
}


def settings_of(name: str, **changes: Any) -> TrainSettings:
    return TrainSettings(**{**COMMON, "epochs": 4, "batch_size": 4, **RUNS[name], **changes})


def die_at(moment: str) -> None:
    """Have a process killed: the second in the so-manieth step, or the first before its second checkpoint."""
    rank = int(os.environ.get("RANK", 0))
    calls = []

    def counting(function: Callable[..., Any], times: int) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            calls.append(1)
            if len(calls) == times:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return wrapped

    if moment.startswith("step") and rank == 1:
        training._step = counting(training._step, int(moment.removeprefix("step")))
    if moment == "checkpoint" and rank == 0:
        from bioscan.learn import sharding  # the shards of epoch 2 are written, what names them is not

        vars(sharding)["write_checkpoint"] = counting(vars(sharding)["write_checkpoint"], 2)


def main() -> None:
    """The program of each process: `whole`, `resume` or a moment to be killed at, DATA, FOLDER, names."""
    torch.set_num_threads(1)
    what, data, folder = sys.argv[1], [Path(a) for a in sys.argv[2:4]], Path(sys.argv[4])
    die_at(what)
    with joined("cpu") as processes:
        for name in sys.argv[5:]:
            if name in RUNS:
                bioscan.train(*data, folder / name, settings_of(name), resume=what == "resume")
                continue
            result = train_case(CASES[name], data, folder / name, processes, resume=what == "resume")
            if processes.first:
                torch.save({"state": result.state, "history": result.run.history}, folder / f"{name}.pt")


def torchrun(*arguments: object, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """This file, or a command line, in several processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*command, "--nproc-per-node", str(processes), *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONWARNINGS": "ignore"},
    )


@pytest.fixture(scope="module")
def painted(paint: Paint) -> tuple[Path, Path]:
    """A tree with holes, records of every depth, an image that cannot be read."""
    data = paint(TREE)
    (data[1] / "Diptera-train-2.jpg").write_bytes(b"broken")
    return data


def states_differ(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


# -- equal to one process


@pytest.fixture(scope="module")
def together(painted: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes give that nobody interrupts: all cases, and the run by DDP."""
    folder = tmp_path_factory.mktemp("together")
    child = torchrun(__file__, "whole", *painted, folder, *IN_FLOAT64, "ddp")
    assert child.returncode == 0, child.stderr
    return folder


@pytest.mark.timeout(300)
def test_two_processes_do_what_one_does(painted: tuple[Path, Path], together: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in IN_FLOAT64:
            case = CASES[name]
            two = torch.load(together / f"{name}.pt")
            one = train_case(case, painted, tmp_path / f"{name}-alone", ONE)
            assert states_differ(one.state, two["state"]) < 1e-10, name
            for row, other in zip(one.run.history, two["history"], strict=True):
                for score in row.keys() - {"seconds"}:
                    assert row[score] == pytest.approx(other[score], abs=1e-10), (name, score)
            other = train_case({**case, "lr": 0.02}, painted, tmp_path / f"{name}-other", ONE)
            assert states_differ(other.state, two["state"]) > 1e-4, name  # so it is no matter of course
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["plain", "mixed", "tree"])
def test_parts_of_a_step_do_what_the_whole_does(
    painted: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    whole, parts = (
        train_case({**CASES[name], "accumulate": accumulate}, painted, tmp_path / str(accumulate), ONE)
        for accumulate in (1, 3)
    )
    assert states_differ(whole.state, parts.state) < 1e-10


# -- kills


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model" / "model.safetensors")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("name", "moment", "kept"),
    # the 27 specimens of an epoch, four at a time, are 7 steps
    [("ddp", "step17", 2), pytest.param("fsdp", "checkpoint", 1, marks=pytest.mark.slow)],
)
def test_processes_killed_at_any_moment_end_with_the_bits_of_those_that_were_not(
    painted: tuple[Path, Path], together: Path, tmp_path: Path, name: str, moment: str, kept: int
) -> None:
    killed, whole = tmp_path / name, together / name
    if not whole.exists():
        assert torchrun(__file__, "whole", *painted, together, name).returncode == 0
    child = torchrun(__file__, moment, *painted, tmp_path, name)
    assert child.returncode != 0
    assert "SIGKILL" in child.stderr
    assert not (killed / "model").exists()
    with pytest.raises(RequestError, match=f"holds a run that stopped after {kept} epochs; pass --resu"):
        bioscan.train(*painted, killed, settings_of(name))
    alone = settings_of(name)
    with pytest.raises(RequestError, match=r"was begun otherwise: processes was 2, is 1; .*--inexact"):
        bioscan.train(*painted, killed, alone, resume=True)
    elsewhere = shutil.copytree(killed, tmp_path / "elsewhere")
    made = bioscan.train(*painted, elsewhere, alone, resume=True, inexact=True)  # also shards of two
    assert [row["epoch"] for row in made["history"]] == [1, 2, 3, 4]
    child = torchrun(__file__, "resume", *painted, tmp_path, name)
    assert child.returncode == 0, child.stderr
    assert states_differ(weights(killed), weights(whole)) == 0
    one, other = (
        [line.rsplit(",", 1)[0] for line in (run / "history.csv").read_text().splitlines()]
        for run in (killed, whole)
    )
    assert one == other  # but for the seconds
    left = {p.name for p in killed.iterdir() if not p.name.endswith(".partial")}
    assert left == {"failed.csv", "history.csv", "model", "record.json", "tensorboard"}
    failed = (killed / "failed.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in failed] == ["key", "Diptera-train-2"]
    record = json.loads((killed / "record.json").read_text())
    assert (record["processes"], record["threads"], record["workers"]) == (2, 1, 0)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_three_processes_sum_in_the_same_order_after_a_kill(
    painted: tuple[Path, Path], tmp_path: Path
) -> None:
    """If DDP formed its groups of gradients anew in the second step, a resumed run would round otherwise."""
    for what, folder in (("whole", "whole"), ("step5", "killed"), ("resume", "killed")):
        child = torchrun(__file__, what, *painted, tmp_path / folder, "wide", processes=3)
        assert (child.returncode == 0) == (what != "step5"), child.stderr
    whole, resumed = (torch.load(tmp_path / folder / "wide.pt")["state"] for folder in ("whole", "killed"))
    assert states_differ(whole, resumed) == 0


# -- the command line, SLURM


@pytest.mark.timeout(200)
def test_the_first_process_alone_speaks(shared: Path, tmp_path: Path) -> None:
    insects = shared / "data/insects"
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in COMMON.items() if name != "batch_size"]
    command = [
        *("-m", "bioscan", "train", insects / "metadata.tsv", insects, "-o", tmp_path / "run", *flags),
        *("--model", "test_resnet", "--experiment", "small_insect_order", "--ranks", "order,family"),
    ]
    child = torchrun(*command)
    assert child.returncode == 0, child.stderr
    lines = child.stdout.splitlines()
    # eleven families, and three orders whose families nobody named
    assert lines[0] == "test_resnet, 14 taxa at ranks order, family: 501 training, 40 validation specimens"
    assert "kept from that for thresholds and sets: 36 validation specimens" in lines
    assert lines[-1] == f"model: {tmp_path / 'run' / 'model'}"
    assert len([line for line in lines if line.startswith("validation ")]) == 7
    assert child.stderr.count("each of the 2 processes has batch norms of its own") == 1
    again = torchrun(*command)
    assert again.returncode != 0
    assert again.stdout == ""
    assert again.stderr.count("bioscan train: ") == 1
    assert f"bioscan train: {tmp_path / 'run'} holds a finished run; choose another" in again.stderr


MEETING = """
import os, sys
import numpy as np
from bioscan.errors import DataError
from bioscan.learn.distributed import ToldElsewhere, joined

try:
    with joined("cpu") as processes:
        processes.total(np.ones(1))
        if processes.rank == 2:
            os._exit(7)
        processes.total(np.ones(1))
except ToldElsewhere:
    print("told elsewhere")
except DataError as error:
    print(error)
"""


def test_a_process_that_ends_is_told_once_by_those_that_are_left() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", MEETING],
            env={**os.environ, **meeting, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    first, second, third = (child.communicate(timeout=50) for child in children)
    assert first[0].startswith("another of the processes has ended"), first
    assert second[0] == "told elsewhere\n", second
    assert third[0] == ""
    assert [child.returncode for child in children] == [0, 0, 7]


@pytest.mark.slow
@pytest.mark.parametrize("distribute", ["ddp", "fsdp"])
def test_a_full_disk_is_told_once_by_processes_too(
    painted: tuple[Path, Path], tmp_path: Path, distribute: str
) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in COMMON.items()]
    limited = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
from bioscan.app.cli import main
sys.argv = ["bioscan", *{["train", *map(str, painted), "-o", str(tmp_path / "run"), *flags]!r}]
sys.argv += ["--model", "test_vit", "--distribute", "{distribute}"]
main()
"""
    program = tmp_path / "limited.py"
    program.write_text(limited)
    child = torchrun(program)
    assert child.returncode != 0
    assert child.stderr.count("bioscan train: ") == 1, child.stderr
    assert ("File too large" if distribute == "ddp" else "is there room on the disk?") in child.stderr
    assert "This is a bug" not in child.stderr
    assert "[rank" not in child.stderr


@pytest.mark.slow
def test_the_tasks_of_srun_find_each_other(painted: tuple[Path, Path], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    tasks = [
        subprocess.Popen(
            [sys.executable, __file__, "whole", *map(str, painted), str(tmp_path), "plain"],
            env={
                **environment,
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_STEP_TASKS_PER_NODE": "2",
                "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank),
                "MASTER_PORT": str(port),
                "PYTHONWARNINGS": "ignore",
            },
        )
        for rank in (0, 1)
    ]
    assert [task.wait(50) for task in tasks] == [0, 0]
    two = torch.load(tmp_path / "plain.pt")
    one = train_case(CASES["plain"], painted, tmp_path / "alone", ONE)
    assert states_differ(one.state, two["state"]) < 1e-10


SLURM = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_JOB_ID": "123456"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (ONE, "")),
        (
            {
                "RANK": "3",
                "WORLD_SIZE": "4",
                "LOCAL_RANK": "1",
                "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "a",
                "MASTER_PORT": "1",
            },
            (Processes(3, 4, 1, 2), "env://"),
        ),
        (
            {**SLURM, "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"},
            (Processes(5, 8, 1, 4), "tcp://gpu03:18456"),  # 15000 + 123456 mod 20000
        ),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, (ONE, "")),  # the script around srun
    ],
)
def test_processes_are_known_by_torchruns_or_sruns_environment(
    environment: dict[str, str], expected: tuple[Processes, str]
) -> None:
    assert distributed._found(environment) == expected
    assert distributed.is_first(environment) == (expected[0].rank == 0)


def test_an_environment_that_says_nothing_is_told() -> None:
    with pytest.raises(RequestError, match="environment of torchrun or srun cannot be understood"):
        distributed.is_first({"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"})


if __name__ == "__main__":
    main()
