"""Metadata in, metadata with split columns out."""

import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl

from bioscan.analysis.splits import BUDGETS, FAMILIES, make_splits, role_counts, split_hash
from bioscan.data.metadata import (
    export_metadata,
    import_metadata,
    key_of,
    read_footer,
    read_metadata,
    scan_metadata,
    write_catalogue,
)
from bioscan.errors import RequestError, unknown
from bioscan.files import refuse_existing
from bioscan.vocabulary import EXPERIMENTS, ROLES

OUTPUTS = (".parquet", ".tsv", ".csv", ".jsonld")


def split(
    metadata: Path | str,
    output: Path | str,
    *,
    seed: int = 1,
    experiments: Collection[str] | None = None,
    families: int = FAMILIES,
    medium: int = BUDGETS["medium"],
    small: int = BUDGETS["small"],
    overwrite: bool = False,
) -> dict[str, Any]:
    """Make roles (see `analysis.splits.make_splits`) and write the metadata with them.

    Every other cell is written as it was read. Split columns that are not made anew stay as they were.

    Args:
        metadata: Catalogue or TSV; never changed.
        output: `.parquet` for a catalogue, else `.tsv`, `.csv` or `.jsonld`.
        seed: Of the shuffles.
        experiments: Names to make; None: all that the data can fill.
        families: Diptera families.
        medium: Budget of the medium experiments.
        small: Budget of the small ones.
        overwrite: Replace the output.

    Returns:
        `rule`, `seed`, `families`, `medium`, `small`; `experiments`: name -> `classes`, `specimens` per role,
        `hash`; `skipped`: name -> reason; `kept`: split columns that stay as they were; `output`.

    Raises:
        RequestError: no experiment can be made, the output exists or is the input, or as `make_splits`.
        DataError: the metadata cannot be used.
    """
    metadata, output = Path(metadata), Path(output)
    if output.suffix not in OUTPUTS:
        raise unknown("form of output", output.suffix or output.name, OUTPUTS)
    refuse_the_input(output, metadata)
    refuse_existing(output, overwrite=overwrite)
    with as_catalogue(metadata, beside=output) as (catalogue, folder):
        known = scan_metadata(catalogue).collect_schema().names()
        for column in ("order", "family"):
            if column not in known:
                raise RequestError(f"{metadata} has no column '{column}', which a split needs")
        key = key_of(known)
        frame = read_metadata(catalogue, [key, "order", "family"])
        splits = make_splits(
            frame, seed=seed, families=families, medium=medium, small=small, experiments=experiments
        )
        if not splits.roles.columns:
            raise RequestError(
                f"{metadata}: no experiment can be made: "
                + "; ".join(f"{name}: {reason}" for name, reason in splits.skipped.items())
            )
        by_key = frame[key].arg_sort()  # once for all hashes
        keys = frame[key].gather(by_key).set_sorted()
        made = {
            name: {
                "classes": role_counts(frame[EXPERIMENTS[name].rank], roles).height,
                "specimens": {role: int((roles == role).sum()) for role in ROLES},
                "hash": split_hash(keys, roles.gather(by_key)),
            }
            for name, roles in splits.roles.to_dict().items()
        }
        table = pl.concat(
            [pl.scan_parquet(catalogue).drop(splits.roles.columns, strict=False), splits.roles.lazy()],
            how="horizontal",
        )
        columns = pl.scan_parquet(catalogue).collect_schema().names()
        table = table.select([*columns, *(c for c in splits.roles.columns if c not in columns)])
        footer = {
            **read_footer(catalogue),
            "split": {"settings": splits.settings, "experiments": made},
        }
        if output.suffix == ".parquet":
            write_catalogue(table, output, footer=footer, overwrite=overwrite)
        else:
            between = folder / "split.parquet"
            write_catalogue(table, between, footer=footer)
            export_metadata(between, output, overwrite=overwrite)
    return {
        **splits.settings,
        "experiments": made,
        "skipped": splits.skipped,
        "kept": [name for name in EXPERIMENTS if name in known and name not in made],
        "output": str(output),
    }


def refuse_the_input(output: Path, metadata: Path) -> None:
    """Raise a RequestError where the output would replace what is read."""
    if output.resolve() == metadata.resolve():
        raise RequestError(f"{output} is the input; name a new file")


@contextmanager
def as_catalogue(
    metadata: Path, *, beside: Path, allow_duplicates: bool = False
) -> Iterator[tuple[Path, Path]]:
    """The metadata as a catalogue, imported into a temporary folder where they are none, and that folder.

    The folder lies where `beside` will be written, so that it has room for as much.
    """
    place = next(folder for folder in beside.absolute().parents if folder.is_dir())
    try:
        temporary = tempfile.TemporaryDirectory(prefix=".bioscan-", dir=place)
    except OSError as error:
        raise RequestError(f"nothing can be written in {place}: {error.strerror}") from None
    with temporary as name:
        folder = Path(name)
        if metadata.suffix == ".parquet":
            yield metadata, folder
        else:
            import_metadata(metadata, folder / "read.parquet", allow_duplicates=allow_duplicates)
            yield folder / "read.parquet", folder
