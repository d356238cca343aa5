"""Settings of a run: a frozen dataclass, layered from defaults, recipe, TOML file and flags; and the record.

Order: default < recipe < TOML file < flag. A field is written once, in the dataclass beside the function
that it sets; flag, TOML key, help and record follow from it.
"""

import dataclasses
import platform
import tomllib
import types
import typing
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from bioscan.errors import DataError, RequestError, unknown

Settings = TypeVar("Settings")


def setting(default: Any, help: str) -> Any:
    """A dataclass field with its help text, which ends with the default."""
    if isinstance(default, tuple):
        text = " ".join(map(str, default)) or "none"
    elif default is None:
        text = "none"
    else:
        text = str(default).lower() if isinstance(default, bool) else str(default)
    return dataclasses.field(default=default, metadata={"help": f"{help} [default: {text}]"})


def layered(
    settings: type[Settings],
    *,
    recipe: Mapping[str, Any] | None = None,
    file: Path | None = None,
    table: str | None = None,
    flags: object | Mapping[str, Any] | None = None,
) -> Settings:
    """Settings from their defaults, a recipe, a TOML file and flags, the later winning.

    Args:
        settings: The frozen dataclass.
        recipe: Values that differ from the defaults.
        file: TOML file with the field names as keys.
        table: Read the keys of this table of the file instead of its top level, if the table is there.
        flags: A mapping, or an object with the fields as attributes; None in it means "not given".

    Raises:
        RequestError: unknown key (with the nearest name) or a value of the wrong type.
    """
    hints = typing.get_type_hints(settings)
    values: dict[str, Any] = {}
    for source, layer in (
        ("recipe", recipe or {}),
        (str(file), _read_toml(file, table) if file else {}),
        ("flags", _given(flags)),
    ):
        for key, value in layer.items():
            if key not in hints:
                raise unknown(f"setting in {source}:", key, hints)
            values[key] = _typed(key, value, hints[key], source)
    return settings(**values)


def _given(flags: object | Mapping[str, Any] | None) -> dict[str, Any]:
    if flags is None:
        return {}
    items = flags.items() if isinstance(flags, Mapping) else vars(flags).items()
    return {key: value for key, value in items if value is not None}


def _read_toml(file: Path, table: str | None) -> dict[str, Any]:
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RequestError(f"{file}: no such settings file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not valid TOML: {error}") from None
    inner = content.get(table) if table else None
    return inner if isinstance(inner, dict) else content


def _typed(key: str, value: Any, hint: Any, source: str) -> Any:
    """The value as the annotated type: int widens to float, list to tuple; anything else must match."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        for option in typing.get_args(hint):
            if option is type(None):
                if value is None:
                    return None
                continue
            try:
                return _typed(key, value, option, source)
            except RequestError:
                continue
    elif origin is typing.Literal:
        if value in typing.get_args(hint):
            return value
        raise unknown(f"value of '{key}' in {source}:", str(value), map(str, typing.get_args(hint)))
    elif origin is tuple:
        if isinstance(value, list | tuple):
            inner = typing.get_args(hint)[0]
            return tuple(_typed(key, v, inner, source) for v in value)
    elif hint is Any:
        return value
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif hint is Path and isinstance(value, str | Path):
        return Path(value)
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    wanted = getattr(hint, "__name__", str(hint))
    raise RequestError(f"{source}: '{key}' is {value!r}, expected {wanted}")


PACKAGES = (
    "bioscan",
    "numpy",
    "polars",
    "pillow",
    "simplejpeg",
    "h5py",
    "opencv-python-headless",
    "torch",
    "timm",
    "transformers",
)


def record(settings: object | None = None, **facts: Any) -> dict[str, Any]:
    """What a run was: settings, versions and the given facts (seed, split hash …), ready for JSON.

    No time and no absolute path: equal runs make equal records.
    """
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    made: dict[str, Any] = {"versions": versions, "platform": f"{platform.system()} {platform.machine()}"}
    if settings is not None:
        made["settings"] = {
            key: str(value) if isinstance(value, Path) else value
            for key, value in dataclasses.asdict(settings).items()  # type: ignore[call-overload]
        }
    return made | facts
