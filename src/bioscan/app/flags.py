"""Flags of the command line, made from the settings dataclasses so that each is written once."""

import dataclasses
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from bioscan.parallel import cores

Overwrite = Annotated[bool, Parameter(negative="", help="Replace the output if it exists.")]
Json = Annotated[bool, Parameter(name="--json", negative="", help="Print the result as JSON.")]
Seed = Annotated[int, Parameter(help="Seed of every random choice.")]
Form = Annotated[
    Literal["folder", "zip", "hdf5", "webdataset", "parquet"] | None,
    Parameter(
        help="Of the new package, where its ending does not say it; webdataset and parquet make a folder "
        "of shards."
    ),
]
Engine = Annotated[Literal["local", "ray"], Parameter(help="Processes of this machine, or a Ray cluster.")]
Address = Annotated[str | None, Parameter(help="Of the Ray cluster: auto or HOST:PORT.")]
Workers = Annotated[int | None, Parameter(help="Processes [default: one per core].")]
Failures = Annotated[Path | None, Parameter(help="CSV of the images that failed.")]
SettingsFile = Annotated[Path | None, Parameter(name="--config", help="TOML file with settings.")]


def flags_of(settings: type[Any]) -> type[Any]:
    """The same dataclass with every field optional and None («not given»), its help beside each flag.

    Use as `Annotated[flags_of(TrainSettings) | None, Parameter(name="*")] = None`, and give the value to
    `bioscan.config.layered(..., flags=value)`.
    """
    hints = typing.get_type_hints(settings)
    fields = []
    for field in dataclasses.fields(settings):
        parameter = Parameter(
            help=field.metadata["help"], show_default=False, consume_multiple=True, negative_iterable=""
        )
        fields.append((field.name, Annotated[hints[field.name] | None, parameter], None))
    made = dataclasses.make_dataclass(f"{settings.__name__}Flags", fields, frozen=True, kw_only=True)
    made.__module__ = settings.__module__
    return made


def crew(workers: int | None, engine: str) -> int | None:
    """The workers asked for, else one per core; a Ray cluster decides for itself.

    On the command line this is the usual thing; in Python one works in one's own process unless told.
    """
    return cores() if workers is None and engine == "local" else workers
