"""What can go wrong, told to the reader: what, where, and the way out.

The command line turns a `BioscanError` into one message and exit status 2; nothing else in the package exits.
"""

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class BioscanError(Exception):
    """Anything that the user can mend. The text is the whole message."""


class RequestError(BioscanError):
    """The request cannot be met: an unknown name, a flag out of range, an output that exists."""


class DataError(BioscanError):
    """An input that cannot be used; the text says which file, line and column."""


class ImageError(BioscanError):
    """One image that cannot be read: a value in batch jobs, not the end of them.

    Attributes:
        name: The image's file name.
        place: Where it lies, for example `cropped_256.zip @ 1048576`.
        reason: What is wrong with it.
    """

    def __init__(self, name: str, place: str, reason: str) -> None:
        super().__init__(name, place, reason)
        self.name, self.place, self.reason = name, place, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason} ({self.place})"


class MissingExtraError(BioscanError):
    """A part of the package whose libraries are not installed."""


def near(name: str, known: Iterable[str]) -> str:
    """A tail for messages about an unknown name: the nearest known one, and all when they are few.

    >>> near("resnt50", ["resnet18", "resnet50"])
    "; did you mean 'resnet50'? (known: resnet18, resnet50)"
    """
    names = sorted(known)
    if not names:
        return ""
    lower = {n.lower(): n for n in reversed(names)}
    match = difflib.get_close_matches(name.lower(), lower, n=1)
    hint = f"; did you mean '{lower[match[0]]}'?" if match else ""
    return f"{hint} (known: {', '.join(names)})" if len(names) <= 20 else hint


def unknown(what: str, name: str, known: Iterable[str]) -> RequestError:
    """The error for a name that is not in a table.

    >>> str(unknown("rank", "famly", ["order", "family"]))
    "unknown rank 'famly'; did you mean 'family'? (known: family, order)"
    """
    return RequestError(f"unknown {what} '{name}'{near(name, known)}")


def require(module: str, extra: str) -> ModuleType:
    """Import a module of an optional extra, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtraError(f"this needs the '{extra}' extra: pip install 'bioscan[{extra}]'") from None
