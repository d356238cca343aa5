"""`bioscan import`."""

from pathlib import Path

from bioscan.app import output as out
from bioscan.app.flags import Json, Overwrite


def run(metadata: Path, catalogue: Path, /, *, overwrite: Overwrite = False, json: Json = False) -> int:
    """Read metadata (TSV, JSON-LD, CSV) into a catalogue, one Parquet file that every verb reads fast.

    Missing values become null whatever marked them; no label is changed. The first bad row, duplicate key or
    cut-off line ends the import with its place, and nothing is written.

    Args:
        metadata: .tsv, .jsonld or .csv file.
        catalogue: .parquet file to write.
    """
    from bioscan.data.metadata import import_metadata

    footer = import_metadata(metadata, catalogue, overwrite=overwrite)
    if json:
        out.show(out.to_json(footer))
        return 0
    out.show(f"{footer['rows']:,} specimens, {len(footer['columns'])} columns, key {footer['key']}")
    renamed = [f"{theirs} → {ours}" for theirs, ours in footer["columns"] if theirs != ours]
    if renamed:
        out.show(f"columns renamed: {', '.join(renamed)}")
    for short, full in footer["roles_renamed"].items():
        out.show(f"role {short} read as {full}")
    if not footer["last_line_ends"]:
        out.say(f"note: the last line of {metadata} does not end in a line break; is the file cut short?")
    out.show(f"licences: {'; '.join(footer['licences']) or 'none stated'}")
    out.show(f"SHA-256 of {footer['source']}: {footer['sha256']}")
    out.show(f"catalogue: {catalogue}")
    return 0
