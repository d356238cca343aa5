"""The command `bioscan`: the table of verbs, and the one place where an error becomes a message and an exit
status.

Exit status: 0 done; 1 done, but some data failed (listed); 2 wrong request or unusable input; 130
interrupted; 70 an error of the program itself, with its traceback.
"""

import os
import signal
import sys
import traceback
from typing import TYPE_CHECKING, Any

from bioscan import __version__
from bioscan.errors import BioscanError, unknown

if TYPE_CHECKING:
    from cyclopts import App, CycloptsError
    from cyclopts.help import HelpPanel
    from rich.console import Console, ConsoleOptions

VERBS = {
    "download": "Fetch the released files: resumed and verified.",
    "import": "Metadata (TSV, JSON-LD, CSV) into a catalogue.",
    "export": "A catalogue back as TSV, JSON-LD or CSV.",
    "check": "List what is wrong: taxonomy, keys, barcodes, pictures.",
    "mend": "Mend or drop what `check` lists, by named steps.",
    "summary": "Statistics: taxa, classes, BINs, barcodes, roles, figures.",
    "split": "Train, validation and test roles of the six experiments.",
    "index": "What is in an image package: missing, surplus, twice.",
    "convert": "An image package in another form, its images byte for byte.",
    "resize": "A package at another size, the shorter side 256 pixels.",
    "crop": "Find the insect, cut it out; boxes, lengths, doubtful ones.",
    "train-detector": "Train a network that finds insects, on COCO boxes.",
    "evaluate-crops": "Score boxes against a person's, as COCO does.",
    "train": "Train a classifier on a catalogue and its images.",
    "import-model": "The paper's checkpoints, and others', as model folders.",
    "embed": "Features of photographs, by any backbone.",
    "adapt": "A model for your own taxa from few photographs, in minutes.",
    "rebalance": "A trained model's head made fair to rare taxa.",
    "calibrate": "Confidence that means something, on your records.",
    "experiments": "The paper's 72 runs: planned, run, resumed, submitted.",
    "predict": "Name the specimens of a catalogue or of photographs.",
    "evaluate": "Score predictions: top-k, macro, F1, average-k, intervals.",
    "compare": "Runs side by side, and beside the paper's figures.",
    "report": "One self-contained HTML page of a run.",
    "synthesize": "An artificial dataset in the real layout, with its truth.",
    "demo": "The whole pipeline on a small artificial dataset.",
}
"""Verb -> one line of help, short enough for a terminal of 80 columns.

The verb lives in `bioscan.app.verbs.<verb>` (`import` in `import_`, `-` is `_`) as `run`, whose docstring is
its help.
"""

BUG = 70
"""Exit status of a crash: `EX_SOFTWARE` of sysexits.h."""
TERMINATED = 143
"""Exit status after SIGTERM, as a shell reports it."""


def build(verb: str | None = None) -> "App":
    """The command line application; verbs are imported when they run.

    Args:
        verb: The verb that will run: its help is then its docstring, not the line in VERBS.
    """
    from attrs import evolve
    from cyclopts import App, Parameter
    from cyclopts.help import DefaultFormatter

    class Formatter(DefaultFormatter):
        """The usual boxes, without the defaults that say nothing."""

        def __call__(self, console: "Console", options: "ConsoleOptions", panel: "HelpPanel") -> None:
            panel.entries = [evolve(entry, default=entry.default or None) for entry in panel.entries]
            super().__call__(console, options, panel)

    app = App(
        name="bioscan",
        help="BIOSCAN-1M insect data: from metadata and photographs to a trained and evaluated classifier.",
        help_epilogue="`bioscan VERB --help` tells the rest.",
        version=f"bioscan {__version__}",
        result_action="return_value",
        suppress_keyboard_interrupt=False,  # ours says one word
        help_format="markdown",
        help_formatter=Formatter(),
        default_parameter=Parameter(show_default=_default),
    )
    for place, (name, line) in enumerate(VERBS.items()):
        module = "import_" if name == "import" else name.replace("-", "_")
        shown = None if name == verb else line
        app.command(
            f"bioscan.app.verbs.{module}:run", name=name, help=shown, sort_key=place, help_epilogue=""
        )
    return app


def _default(value: Any) -> str:
    """A default as help shows it: lists as they are typed; "" for «off», «none given» and the empty list."""
    if value is None or value is False:
        return ""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit status."""
    from cyclopts import CycloptsError

    verb = arguments[0] if arguments and arguments[0] in VERBS else None
    name = f"bioscan {verb}" if verb else "bioscan"
    try:
        if arguments and verb is None and arguments[0] not in ("--help", "-h", "--version"):
            raise unknown("verb", arguments[0], VERBS)
        result = build(verb)(arguments, exit_on_error=False, print_error=False)
        sys.stdout.flush()  # a closed pipe shows here at the latest, not at the interpreter's end
    except CycloptsError as error:
        return _fail(name, f"{_request(error)} (see {name} --help)")
    except BioscanError as error:
        return _fail(name, str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except SystemExit as error:
        if error.code != 1:
            raise
        return 0  # what rich, which prints the help, makes of a closed pipe
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(name, f"{where}{error.strerror or error}")
    return result if isinstance(result, int) else 0


def _request(error: "CycloptsError") -> str:
    """What is wrong with a command line."""
    from cyclopts import MissingArgumentError, UnusedCliTokensError

    if isinstance(error, UnusedCliTokensError):
        return f"unexpected argument {' '.join(error.unused_tokens or [])}"
    if isinstance(error, MissingArgumentError) and error.argument and not error.argument.tokens:
        return f"{error.argument.name} is missing"
    return str(error).rstrip(".")


def _fail(name: str, message: str) -> int:
    from bioscan.app.output import say

    say(f"{name}: {message}")
    return 2


def main() -> None:
    """Entry point."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # so that half-written files are removed
    try:
        status = run(sys.argv[1:])
    except Exception:  # noqa: BLE001 - whatever else comes is a bug of ours, and said to be one
        traceback.print_exc()
        print("This is a bug in bioscan. Please report it with the lines above.", file=sys.stderr)
        status = BUG
    sys.exit(status)
