"""`bioscan export`."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from bioscan.app import output as out
from bioscan.app.flags import Json, Overwrite


def run(
    catalogue: Path,
    /,
    *,
    to: Literal["tsv", "jsonld", "csv"] = "tsv",
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Write a catalogue back as TSV, JSON-LD or CSV, cell for cell what was read.

    Args:
        catalogue: Catalogue.
        to: Form to write.
        output: File to write [default: the catalogue's name with the form's ending].
    """
    from bioscan.data.metadata import export_metadata
    from bioscan.errors import RequestError

    target = output or catalogue.with_suffix(f".{to}")
    if target.suffix != f".{to}":
        raise RequestError(f"{target}: a .{to} file is asked for; name it so, or change --to")
    written = export_metadata(catalogue, target, overwrite=overwrite)
    if json:
        out.show(out.to_json({**written, "output": str(target)}))
    else:
        out.show(f"{written['rows']:,} rows, {written['columns']} columns: {target}")
    return 0
