"""`bioscan index`."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from bioscan.app import output as out
from bioscan.app.flags import Address, Engine, Json, Overwrite, Workers, crew
from bioscan.vocabulary import part_path

if TYPE_CHECKING:
    from bioscan.jobs.index import Contents

_FEW_RUNS = 4
_WIDTH = 90


def run(
    package: Path,
    /,
    *,
    metadata: Path | None = None,
    hash: Annotated[bool, Parameter(negative="")] = False,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
    limit: int = 5,
    engine: Engine = "local",
    workers: Workers = None,
    address: Address = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Show what is in an image package, and save the index of its byte ranges beside it.

    Every other verb makes the same index when it needs one; with it, an image is one read. With --hash every
    image is read and compared with the checksum that a ZIP holds, and identical images are found. The exit
    status is 1 if one could not be read.

    Args:
        package: Folder, part folders, ZIP, TAR (WebDataset), HDF5 or Parquet file, a folder of such archives
            or a pattern of them in quotes: 'shards/{000..012}.tar', 'parts/*.zip'.
        metadata: Catalogue or TSV, to find missing and surplus images.
        hash: Read every image; find damaged and identical ones.
        output: Table of all images (.parquet or .csv): places, sizes, after --hash sha256 and error.
        limit: Names shown of each kind; JSON has all of them.
    """
    from bioscan.errors import RequestError
    from bioscan.jobs.index import index, summary

    if limit < 0:
        raise RequestError(f"--limit is {limit}; 0 or more is needed")
    with out.progress("reading", "images") as progress:
        contents = index(
            package,
            metadata=metadata,
            hash=hash,
            output=output,
            engine=engine,
            workers=crew(workers, engine),
            address=address,
            overwrite=overwrite,
            progress=progress,
        )
    found = summary(contents)
    if json:
        out.show(out.to_json(found))
    else:
        out.show(as_text(contents, found, limit))
    failed = contents.failed if hash else None
    if failed is None or failed.is_empty():
        return 0
    first = failed.row(0, named=True)
    out.say(
        f"{failed.height:,} of {found['images']:,} images could not be read "
        f"(first: {_path(first)}: {first['error']})"
    )
    return 1


def as_text(contents: "Contents", found: dict[str, Any], limit: int) -> str:
    """What is there, then what is odd about it, with the first names of each kind."""
    head = found["form"]
    if found["archives"]:
        files = f"{found['archives']:,} files" if found["archives"] > 1 else "one file"
        head += f", {files}, {_bytes(found['archive_bytes'])}"
    facts = [
        ("form", head),
        ("index", found["index"] or "not saved: the place cannot be written to"),
        ("images", f"{found['images']:,}"),
        ("parts", _runs(contents.parts.rows())),
    ]
    if found["smallest"]:
        mean = found["bytes"] // max(1, contents.table["size"].count())
        facts += [
            ("bytes", f"{found['bytes']:,} in all, {mean:,} on average"),
            *((what, f"{found[what]['size']:,} {_path(found[what])}") for what in ("smallest", "largest")),
        ]
    facts += [
        ("stored as", _counts(found["encodings"])),
        (
            "endings",
            _counts({name if name == "none" else f".{name}": n for name, n in found["extensions"].items()}),
        ),
    ]
    blocks = ["\n".join(f"{name:<10} {value}" for name, value in facts)]

    twice = [f"{_path(row)} ({row['place']}; taken: {row['kept']})" for row in found["duplicates"]]
    others = {name: count for name, count in found["left_out"].items() if name != "duplicate"}
    unreadable = [f"{_path(row)}: {row['encoding']}" for row in found["unreadable"]]
    blocks += [
        _block(f"{len(twice):,} left out: another of the same name and part came before", twice, limit),
        _block(
            f"{sum(others.values()):,} members that are no images ({_counts(others)})",
            found["no_images"],
            limit,
        ),
        _block(
            f"{len(found['unsafe']):,} with an unsafe path (absolute, «..», a drive); it is never used",
            found["unsafe"],
            limit,
        ),
        _block(f"{len(unreadable):,} stored in a way that cannot be read", unreadable, limit),
    ]
    if contents.compared:
        missing = [_path({**row, "name": row["image_file"]}, "chunk_number") for row in found["missing"]]
        surplus = [_path(row) for row in found["surplus"]]
        of_all = f"of {found['records']:,} records"
        blocks += [
            _block(f"{len(missing):,} {of_all}: image missing from the package", missing, limit),
            _block(f"{len(surplus):,} of {found['images']:,} images in no record", surplus, limit),
        ]
        if not missing and not surplus:
            blocks.append(f"each of {found['records']:,} records has its image, and each image its record")
    if contents.hashed:
        groups = found["identical"]
        alike = sum(group["images"] for group in groups)
        same = [
            f"{', '.join(map(_shown, g['names'][:3]))}{' …' * (g['images'] > 3)} ({g['bytes']:,} bytes)"
            for g in groups
        ]
        failed = [f"{_path(row)}: {row['error']}" for row in found["failed"]]
        several = "s" * (len(groups) > 1)
        blocks += [
            f"{found['images'] - len(failed):,} of {found['images']:,} images read",
            _block(f"{len(failed):,} could not be read", failed, limit),
            _block(f"{alike:,} images of identical bytes, in {len(groups):,} group{several}", same, limit),
        ]
    return "\n\n".join(block for block in blocks if block)


def _block(title: str, names: Sequence[str], limit: int) -> str:
    """A title and the first names below it; nothing where there are none."""
    if not names:
        return ""
    lines = [title, *(f"  {_shown(name)}" for name in names[:limit])]
    if limit and len(names) > limit:
        lines.append(f"  … and {len(names) - limit:,} more")
    return "\n".join(lines)


def _shown(name: str) -> str:
    return out.printable(name, _WIDTH)


def _path(row: dict[str, Any], part: str = "part") -> str:
    return _shown(part_path(row["name"], row.get(part)))


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def _runs(parts: Sequence[tuple[int | None, int]]) -> str:
    """Parts and their images, runs of equal ones together: `1–112: 10,000 each; 113: 8,313`."""
    numbered = [(number, count) for number, count in parts if number is not None]
    bare = sum(count for number, count in parts if number is None)
    if not numbered:
        return "none"
    runs: list[str] = []
    for _, group in itertools.groupby(
        enumerate(numbered), key=lambda item: (item[1][0] - item[0], item[1][1])
    ):
        members = [pair for _, pair in group]
        (first, count), last = members[0], members[-1][0]
        runs.append(f"{first}: {count:,}" if first == last else f"{first}–{last}: {count:,} each")
    text = "; ".join(runs)
    if len(runs) > _FEW_RUNS:
        counts = [count for _, count in numbered]
        first, last = numbered[0][0], numbered[-1][0]
        text = f"{len(numbered):,} of {first}–{last}, {min(counts):,} to {max(counts):,} images each"
    return f"{text}; {bare:,} images in none" if bare else text
