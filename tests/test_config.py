"""Settings: default < recipe < TOML file < flag, and what is wrong is named."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from bioscan.config import layered, record, setting
from bioscan.errors import BioscanError, DataError, RequestError


@dataclasses.dataclass(frozen=True)
class Run:
    epochs: int = setting(10, "Epochs.")
    rate: float = setting(0.1, "Learning rate.")
    shuffle: bool = setting(True, "Shuffle.")
    loss: Literal["cross_entropy", "focal"] = setting("cross_entropy", "Loss.")
    steps: tuple[int, ...] = setting((20, 25), "Epochs at which the rate falls.")
    weights: Path | None = setting(None, "Weights file.")  # noqa: RUF009 - makes a field
    patience: int | None = setting(None, "Early stop.")


def toml(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_each_layer_wins_over_the_one_before(tmp_path: Path) -> None:
    file = toml(tmp_path, "epochs = 3\nrate = 0.3\n")
    recipe = {"epochs": 2, "rate": 0.2, "shuffle": False}
    assert layered(Run) == Run()
    assert layered(Run, recipe=recipe) == Run(epochs=2, rate=0.2, shuffle=False)
    assert layered(Run, recipe=recipe, file=file) == Run(epochs=3, rate=0.3, shuffle=False)
    flags = {"epochs": 4, "rate": None}
    assert layered(Run, recipe=recipe, file=file, flags=flags) == Run(epochs=4, rate=0.3, shuffle=False)
    assert layered(Run, flags=SimpleNamespace(epochs=4, rate=None)) == Run(epochs=4)


def test_a_flag_equal_to_the_default_still_wins_over_the_file(tmp_path: Path) -> None:
    assert layered(Run, file=toml(tmp_path, "epochs = 3"), flags={"epochs": 10}).epochs == 10


def test_a_table_of_the_file_is_read_where_it_is_there(tmp_path: Path) -> None:
    file = toml(tmp_path, "[train]\nepochs = 3\n[predict]\nbatch = 1\n")
    assert layered(Run, file=file, table="train").epochs == 3
    assert layered(Run, file=toml(tmp_path, "epochs = 5"), table="train").epochs == 5


def test_values_take_the_type_of_their_field(tmp_path: Path) -> None:
    file = toml(tmp_path, 'rate = 1\nsteps = [1, 2]\nweights = "w.safetensors"\npatience = 5\n')
    made = layered(Run, file=file)
    assert made == Run(rate=1.0, steps=(1, 2), weights=Path("w.safetensors"), patience=5)
    assert type(made.rate) is float


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3", "unknown setting in {file}: 'epoch'; did you mean 'epochs'?"),
        ('epochs = "3"', "{file}: 'epochs' is '3', expected int"),
        ("epochs = 3.5", "{file}: 'epochs' is 3.5, expected int"),
        ("epochs = true", "{file}: 'epochs' is True, expected int"),
        ("rate = true", "{file}: 'rate' is True, expected float"),
        ("shuffle = 1", "{file}: 'shuffle' is 1, expected bool"),
        ("steps = 3", "{file}: 'steps' is 3, expected tuple"),
        ('steps = [1, "x"]', "{file}: 'steps' is 'x', expected int"),
        ('loss = "focl"', "unknown value of 'loss' in {file}: 'focl'; did you mean 'focal'?"),
        ("loss = [1]", "unknown value of 'loss' in {file}: '[1]'"),
        ("weights = 3", "{file}: 'weights' is 3, expected"),
        ("epochs = ", "{file}: not valid TOML"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_its_file(tmp_path: Path, text: str, message: str) -> None:
    file = toml(tmp_path, text)
    with pytest.raises(BioscanError) as caught:
        layered(Run, file=file)
    assert message.format(file=file) in str(caught.value)


def test_a_file_that_is_absent_or_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no\.toml: no such settings file"):
        layered(Run, file=tmp_path / "no.toml")
    (tmp_path / "run.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not valid TOML"):
        layered(Run, file=tmp_path / "run.toml")


def test_the_help_of_a_field_ends_with_its_default() -> None:
    helps = {field.name: field.metadata["help"] for field in dataclasses.fields(Run)}
    assert helps["steps"] == "Epochs at which the rate falls. [default: 20 25]"
    assert helps["shuffle"] == "Shuffle. [default: true]"
    assert helps["weights"] == "Weights file. [default: none]"


def test_equal_runs_make_equal_records_that_json_can_hold() -> None:
    made: dict[str, Any] = record(Run(weights=Path("w")), seed=1)
    assert made == record(Run(weights=Path("w")), seed=1)
    assert made["settings"]["weights"] == "w"
    assert made["seed"] == 1
    assert made["versions"]["bioscan"]
    assert json.loads(json.dumps(made))["settings"]["steps"] == [20, 25]
    assert "settings" not in record()
