"""Where each image of a package lies: name, part, file, offset, length and encoding, as one table.

An opener per kind of package (`OPENERS`) lists its members; nothing is unpacked. A package may be one archive
or many (a folder of them, a pattern); each is listed by itself. The table is saved as Parquet beside the
package with the stamp of every archive or folder that it lists, and made again when one of them changed.
"""

import contextlib
import functools
import glob
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import polars as pl

from bioscan.data.hdf5_layout import image_datasets
from bioscan.data.parquet_layout import has_images, list_parquet
from bioscan.data.tar_layout import BLOCK, is_tar_header, list_tar
from bioscan.data.zip_layout import ZIP_METHODS, list_zip
from bioscan.errors import BioscanError, DataError, RequestError, near
from bioscan.files import writing
from bioscan.parallel import map_shards
from bioscan.vocabulary import FOOTER, HDF5_GROUP, IMAGE_FOLDER

VERSION: Final = 3
EXTENSIONS: Final = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif")
"""Which members are images, whatever the case of the letters."""
IMAGE: Final = r"(?i)\.(jpe?g|png|tiff?|bmp|webp|gif)$"
HIDDEN: Final = r"(^|/)(\.[^./]|\.\.[^/]|__MACOSX/)"
_IN_PART: Final = r"^(?:.*/)?part(\d{1,9})/(.+)$"
_UNSAFE: Final = r"^/|^[A-Za-z]:|(^|/)\.\.(/|$)|\x00"

ENCODINGS: Final = pl.Enum(
    [
        *ZIP_METHODS.values(),
        "unknown method",
        "encrypted",
        "damaged",
        "overlapping",
        "sparse",
        "raw",
        "h5py",
        "parquet",
        "path only",
    ]
)
"""How a member is stored. `file`: its bytes as they are; `deflated`: inflate them; `raw`: H x W x 3 uint8
pixels; `h5py`: chunked or compressed HDF5, `parquet`: a row of a table, both without a byte range and read
through their library, in storage order. The others cannot be read."""
READABLE: Final = ("file", "deflated", "raw", "h5py", "parquet")
PLAIN: Final = ENCODINGS.categories.to_list().index("file")
"""Physical value of the encoding `file`."""

SCHEMA: Final = {
    "name": pl.String(),
    "part": pl.Int32(),
    "container": pl.String(),
    "member": pl.String(),
    "offset": pl.Int64(),
    "length": pl.Int64(),
    "size": pl.Int64(),
    "encoding": ENCODINGS,
    "height": pl.Int32(),
    "width": pl.Int32(),
    "crc": pl.UInt32(),
    "unsafe": pl.Boolean(),
}
"""name: as looked up, NFC; part: number of its part folder or null; container: the file to open, relative to
the package's folder; member: dataset within an HDF5 file where h5py must read it, else null; offset, length:
bytes stored (a table: its row, null); size: bytes as the reader gets them; height, width: pixels of a raw
array, else null; crc: CRC-32 that a ZIP archive holds, else null; unsafe: its path within the archive is
absolute, holds `..`, a drive or a zero byte (reading never uses it). In folders length and size are null: a
file is as long as it is when it is read."""

LEFT_OUT: Final = pl.Enum(["duplicate", "not an image", "hidden", "link", "special"])
"""Why a member is not in the index: one of the same name and part came before; another kind of file or of
dataset; name with a dot in front or in `__MACOSX`; link within an archive (but hard links to a file before
them in a TAR); device, FIFO."""

_ARCHIVES: Final = {".zip": "zip", ".tar": "tar", ".hdf5": "hdf5", ".h5": "hdf5", ".parquet": "parquet"}
"""Endings by which the archives of a folder are known."""
_PACKED: Final = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
}
"""First bytes of compressed files -> the program that undoes it."""
_SAVED: Final = ".index.parquet"
_BATCH: Final = 100_000
_MOST_NAMES: Final = 100_000
"""Archives that a pattern with braces may stand for."""
_CLOCK_S: Final = 2
"""Coarsest clock of a file system in use (FAT). A folder changed so shortly before its index was saved may
have changed again without a sign; such an index is not trusted."""


@dataclass(frozen=True)
class PackageIndex:
    """The members of a package."""

    frame: pl.DataFrame
    """Columns of `SCHEMA`, in storage order: archive by archive, in each by place."""
    form: str
    """`folder`, `part folders`, `zip`, `tar`, `hdf5` or `parquet`."""
    left_out: pl.DataFrame
    """Members that are not in the index: columns of SCHEMA (`name` is the whole path), and `left_out`."""
    fingerprint: str
    base: Path
    """Absolute folder that the containers are relative to."""
    containers: dict[str, str]
    """Archive, relative to `base` -> its stamp, `<size>-<mtime in ns>`; empty for a folder of images."""

    @property
    def duplicates(self) -> int:
        """Members left out because one of the same name and part came before."""
        return int((self.left_out["left_out"] == "duplicate").sum())


class _Listing(NamedTuple):
    """What the walk through a folder finds."""

    frame: pl.DataFrame
    """Columns `path` (within the package), `kind` and those of SCHEMA that are known."""
    folders: dict[str, int]
    """Relative path -> mtime in ns of each folder listed."""


def index_path(package: Path) -> Path:
    """Where the index of a package is saved: beside it, for a pattern in the folder that it starts from."""
    if _is_pattern(package):
        base = _base(package)
        name = re.sub(r"[^\w.-]+", "_", package.relative_to(base).as_posix())
        return base / f"{name}{_SAVED}"
    return package.with_name(f"{package.name}{_SAVED}")


def load_index(
    package: Path,
    *,
    save: bool = True,
    engine: str = "local",
    workers: int | None = None,
    address: str | None = None,
) -> PackageIndex:
    """The index of a package: the saved one where it still holds, else made now and saved.

    A place that cannot be written to is no error: the index is then made each time.

    Args:
        package: Folder, archive, folder of archives of one kind, or a pattern of archives (`*`, `?`, `[...]`,
            `{000..012}`, `{a,b}`).
        save: Save it.
        engine: Where many archives are listed, as for `parallel.map_shards`.
        workers: Processes that list many archives, as for `parallel.map_shards`.
        address: Of the cluster.

    Raises:
        RequestError: nothing there, a kind of file that is no package, or several packages in one place.
        DataError: a damaged archive, or no image in it.
    """
    package = Path(os.path.abspath(package))  # noqa: PTH100 - `absolute` keeps "..", which is no name
    kind = "folder" if _is_pattern(package) else _kind(package)
    saved = _saved_index(package)
    if saved is not None:
        return saved
    base = _base(package)
    folder = _Listing(pl.DataFrame(), {})
    if _is_pattern(package):
        names = _matching(package)
        kind = _one_kind(package, {name: _kind(base / name) for name in names})
    elif kind == "folder":
        folder = OPENERS[kind](package)
        names, kind = _archives_in(package, folder.frame)
    else:
        names = [package.name]
    containers = {name: _stamp(base / name) for name in names}
    if names:
        listed = functools.partial(_list_archive, kind, base)
        frames = dict(map_shards(listed, names, engine=engine, workers=workers, address=address))
        frame = pl.concat([frames[number] for number in range(len(names))])
        fingerprint = containers[package.name] if package.is_file() else _digest(containers)
    else:
        frame, fingerprint = folder.frame, _digest(folder.folders)
    index = PackageIndex(*_finish(frame, package, kind), fingerprint, base, containers)
    if save:
        footer = {
            "version": VERSION,
            "form": index.form,
            "fingerprint": fingerprint,
            "containers": containers,
            "folders": folder.folders,
        }
        rows = pl.concat([index.frame, index.left_out], how="diagonal")
        with (
            contextlib.suppress(OSError, BioscanError),
            writing(index_path(package), overwrite=True) as partial,
        ):
            rows.write_parquet(partial, metadata={FOOTER: json.dumps(footer)})
    return index


def _saved_index(package: Path) -> PackageIndex | None:
    """The index beside the package, if it is ours and the package is as it was."""
    file, base = index_path(package), _base(package)
    try:
        saved_at = file.stat().st_mtime
        footer = json.loads(pl.read_parquet_metadata(file)[FOOTER])
        if footer["version"] != VERSION:
            return None
        folders, containers = footer["folders"], footer["containers"]
        if folders:
            now = {name: (package / name).stat().st_mtime_ns for name in folders}
            if now != folders or max(folders.values()) > (saved_at - _CLOCK_S) * 1e9:
                return None
        elif [*containers] != (_matching(package) if _is_pattern(package) else [package.name]):
            return None
        if any(_stamp(base / name) != stamp for name, stamp in containers.items()):
            return None
        frame = pl.read_parquet(file, schema={**SCHEMA, "left_out": LEFT_OUT})
    except (OSError, pl.exceptions.PolarsError, BioscanError, KeyError, TypeError, ValueError):
        return None
    kept = frame.filter(pl.col("left_out").is_null()).drop("left_out")
    left_out = frame.filter(pl.col("left_out").is_not_null())
    if not _sound(kept, containers):
        return None
    return PackageIndex(kept, footer["form"], left_out, footer["fingerprint"], base, containers)


def _sound(frame: pl.DataFrame, containers: Mapping[str, str]) -> bool:
    """Whether a table that lay beside the package is one that we could have saved.

    It may have come with the package from anyone: no file outside of it is opened on its word.
    """
    if frame.is_empty() or any(frame.select("name", "container", "offset", "encoding").null_count().row(0)):
        return False
    if containers:
        held = {*frame["container"].unique()} <= {*containers}
        return held and not any(re.search(_UNSAFE, name) for name in containers)
    return not frame["container"].str.contains(_UNSAFE).any()


def _stamp(file: Path) -> str:
    status = file.stat()
    return f"{status.st_size}-{status.st_mtime_ns}"


def _digest(stamps: Mapping[str, int | str]) -> str:
    return hashlib.sha256(json.dumps(sorted(stamps.items())).encode()).hexdigest()


# -- which archives


def _is_pattern(package: Path) -> bool:
    return re.search(r"[*?\[{]", str(package)) is not None and not package.exists()


def _base(package: Path) -> Path:
    """The folder that containers are relative to: the package itself, or where its file or pattern lies."""
    if package.is_dir():
        return package
    if not _is_pattern(package):
        return package.parent
    base = Path(package.anchor)
    for part in package.relative_to(base).parts:
        if not (base / part).is_dir():
            break
        base /= part
    return base


def _matching(package: Path) -> list[str]:
    """The files that a pattern stands for, relative to its base, part2 before part10.

    Raises:
        RequestError: none, too many, or one that is not there although the pattern names it.
    """
    base = _base(package)
    pattern = package.relative_to(base).as_posix()
    names: set[str] = set()
    expanded = list(itertools.islice(_expanded(pattern), _MOST_NAMES + 1))
    if len(expanded) > _MOST_NAMES:
        raise RequestError(f"{package}: the pattern stands for more than {_MOST_NAMES:,} archives")
    for name in expanded:
        if glob.has_magic(name):
            found = glob.glob(name, root_dir=base)  # noqa: PTH207 - keeps names relative to the base
            names.update(Path(n).as_posix() for n in found if not n.endswith(_SAVED) and (base / n).is_file())
        elif (base / name).is_file():
            names.add(name)
        else:
            raise RequestError(f"{package}: no such file: {name}; is the download complete?")
    if not names:
        known = [entry.name for entry in base.iterdir() if not entry.name.endswith(_SAVED)]
        raise RequestError(f"{package}: no file of this pattern{near(package.name, known)}")
    return sorted(names, key=_natural)


def _expanded(pattern: str) -> Iterator[str]:
    """A pattern without its braces: `{08..10}` counts, `{a,b}` chooses.

    >>> list(_expanded("{a,b}-{08..10}.tar"))
    ['a-08.tar', 'a-09.tar', 'a-10.tar', 'b-08.tar', 'b-09.tar', 'b-10.tar']
    """
    found = re.search(r"\{(?:(\d{1,18})\.\.(\d{1,18})|([^{}]*,[^{}]*))\}", pattern)
    if not found:
        yield pattern
        return
    choices: Iterable[str]
    if found[3] is None:
        padded = any(len(end) > 1 and end[0] == "0" for end in (found[1], found[2]))
        width = max(len(found[1]), len(found[2])) if padded else 0
        first, last = int(found[1]), int(found[2])
        step = 1 if first <= last else -1
        choices = (f"{n:0{width}d}" for n in range(first, last + step, step))
    else:
        choices = found[3].split(",")
    for choice in choices:
        yield from _expanded(pattern[: found.start()] + choice + pattern[found.end() :])


def _natural(name: str) -> list[str | int]:
    """Sorting key: numbers within a name by their value."""
    return [int(piece) if place % 2 else piece for place, piece in enumerate(re.split(r"([0-9]+)", name))]


def _archives_in(package: Path, files: pl.DataFrame) -> tuple[list[str], str]:
    """The archives of a folder, in natural order, and their kind; none where the folder holds images."""
    plain = files.filter(pl.col("kind").is_null())["path"]
    if plain.str.contains(IMAGE).any():
        return [], "folder"
    kinds = {}
    for name in sorted(plain.filter(~plain.str.ends_with(_SAVED)), key=_natural):
        kind = _ARCHIVES.get(Path(name).suffix.lower())
        if kind and (kind != "parquet" or has_images(package / name)):  # else a catalogue, say
            kinds[name] = kind
    if not kinds:
        return [], "folder"
    _one_kind(package, kinds)
    return [*kinds], _one_kind(package, {name: _kind(package / name) for name in kinds})


def _one_kind(package: Path, kinds: Mapping[str, str]) -> str:
    first: dict[str, str] = {kind: name for name, kind in reversed([*kinds.items()])}
    if len(first) > 1:
        named = ", ".join(sorted(first.values()))
        raise RequestError(
            f"{package}: archives of several kinds ({named}); name one, or a pattern of one kind"
        )
    return next(iter(first))


def _kind(package: Path) -> str:
    """Which opener takes it, by content first."""
    if package.is_dir():
        return "folder"
    if not package.exists():
        where = package.parent
        known = [entry.name for entry in where.iterdir()] if where.is_dir() else []
        raise RequestError(f"{package}: no such image package{near(package.name, known)}")
    with package.open("rb") as file:
        start = head = file.read(BLOCK)
        if head[:4] in (b"PK\3\4", b"PK\5\6"):
            return "zip"
        if start[:4] == b"PAR1":
            return "parquet"
        if is_tar_header(start):
            return "tar"
        # Last, for these may hold it too, in an image: the HDF5 signature, at 0 or after a user block of 512,
        # 1024, 2048, ... bytes.
        place = 0
        while len(head) >= 8:
            if head[:8] == b"\x89HDF\r\n\x1a\n":
                return "hdf5"
            place = max(512, 2 * place)
            file.seek(place)
            head = file.read(8)
    suffix = package.suffix.lower()
    if not start:
        raise DataError(f"{package}: the file is empty")
    if suffix == ".tar" and not start.strip(b"\0"):
        return "tar"
    if suffix == ".zip":
        return "zip"
    for first, program in _PACKED.items():
        if start.startswith(first):
            raise RequestError(
                f"{package}: compressed as a whole, so that no image in it can be read by itself; "
                f"undo that once: {program} --keep {package.name}"
            )
    if suffix in _ARCHIVES:
        kind = {"hdf5": "an HDF5", "tar": "a TAR", "parquet": "a Parquet"}[_ARCHIVES[suffix]]
        raise DataError(f"{package}: not {kind} file, its signature is missing; is the download complete?")
    raise RequestError(
        f"{package}: not a package of images; known are: a folder, part folders (part1, part2, ...), "
        "ZIP, TAR, HDF5 and Parquet files, one or many"
    )


# -- from members to images


def _finish(frame: pl.DataFrame, package: Path, kind: str) -> tuple[pl.DataFrame, str, pl.DataFrame]:
    """Names, parts, order; one row per name and part; and what was left out."""
    path = pl.col("path")
    frame = frame.with_columns(path.str.replace(r"^(\./+)+", "")).filter(pl.col("kind").ne_missing("folder"))
    in_archive = kind not in ("folder", "parquet")  # of a table the path is only where a name comes from
    frame = frame.with_columns(unsafe=path.str.contains(_UNSAFE) & in_archive)
    named = path.str.contains(IMAGE) | (kind == "parquet")  # of a table each row is an image
    reason = pl.coalesce(
        pl.col("kind"),
        pl.when(path.str.contains(HIDDEN)).then(pl.lit("hidden")),
        pl.when(~named).then(pl.lit("not an image")),
    )
    frame = frame.with_columns(left_out=reason.cast(LEFT_OUT))
    left_out = frame.filter(pl.col("left_out").is_not_null())
    frame = frame.filter(pl.col("left_out").is_null())
    if frame.is_empty():
        raise DataError(f"{package}: no images in it (names ending in {', '.join(EXTENSIONS)})")
    _refuse_several(frame["path"], package, kind)
    frame = _named(frame)
    if kind == "parquet":
        frame = frame.with_columns(unsafe=pl.col("name").str.contains(_UNSAFE))
    if kind == "folder":
        frame = frame.sort("part", "name", maintain_order=True)
    first = frame.select(pl.struct("name", "part").is_first_distinct()).to_series()
    unique, twice = frame.filter(first), frame.filter(~first)
    copies = sorted({*twice["container"]} - {*unique["container"]}, key=_natural)
    if kind != "folder" and copies:
        raise RequestError(
            f"{package}: every image of {copies[0]} is in another archive too: is it a copy, or another "
            "package? Name one of them, or a pattern"
        )
    form = kind
    if kind == "folder" and unique["part"].null_count() < unique.height:
        form = "part folders"
    twice = twice.with_columns(left_out=pl.lit("duplicate", LEFT_OUT))
    left_out = pl.concat([twice, left_out.with_columns(name=path)], how="diagonal")
    return _columns(unique), form, _columns(left_out, {"left_out": LEFT_OUT})


def _columns(
    frame: pl.DataFrame, more: Mapping[str, pl.DataType | type[pl.DataType]] | None = None
) -> pl.DataFrame:
    """Those of SCHEMA, null where they are not known."""
    wanted = {**SCHEMA, **(more or {})}
    return frame.select(
        (pl.col(name) if name in frame.columns else pl.lit(None).alias(name)).cast(kind)
        for name, kind in wanted.items()
    ).rechunk()


def _named(frame: pl.DataFrame) -> pl.DataFrame:
    """With `name` and `part` from `path`: below part<N>, else below the folders that all share.

    An unsafe path stays as it is.
    """
    path, safe = pl.col("path"), ~pl.col("unsafe")
    part = pl.when(safe).then(path.str.extract(_IN_PART, 1).cast(pl.Int32))
    frame = frame.with_columns(
        pl.coalesce("part", part).alias("part") if "part" in frame.columns else part.alias("part"),
        pl.when(safe).then(path.str.extract(_IN_PART, 2)).otherwise(path).alias("name"),
    )
    loose = frame.filter(pl.col("name").is_null())["path"]
    if not loose.is_empty():
        # the folders that all of them share, which are those that the first and the last in order share
        first, last = str(loose.min()).split("/")[:-1], str(loose.max()).split("/")[:-1]
        shared = [
            a for a, b in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
        ]
        frame = frame.with_columns(pl.col("name").fill_null(path.str.slice(sum(len(a) + 1 for a in shared))))
    return frame.with_columns(pl.col("name").str.normalize("NFC"))


def _refuse_several(paths: pl.Series, package: Path, kind: str) -> None:
    """Raise where a part, or the place of a published package, is there twice: which one is meant?"""
    root = f"{package.as_posix()}/" if kind == "folder" else ""
    published: set[str] = set()
    parts: dict[int, set[str]] = {}
    for folder in paths.str.extract("^(.*/)").drop_nulls().unique():
        if found := re.search(f"(?:^|/)({IMAGE_FOLDER}/[^/]+)/", root + folder):
            published.add(found[1])
        if found := re.match(r"((?:.*/)?)part(\d{1,9})/", folder):
            parts.setdefault(int(found[2]), set()).add(found[1].strip("/") or ".")
    for places in (published, *parts.values()):
        if len(places) > 1:
            hint = "extract it and name one of them" if package.is_file() else "name one of them"
            raise RequestError(f"{package}: several packages in one ({', '.join(sorted(places))}); {hint}")


# -- openers


def _list_folder(package: Path) -> _Listing:
    """All files at any depth; links are followed, each folder is visited once."""
    folders: dict[str, int] = {}
    visited: set[tuple[int, int]] = set()
    frames: list[pl.DataFrame] = []
    waiting = [""]
    while waiting:
        relative = waiting.pop()
        place = package / relative
        status = place.stat()  # before listing: a change in between is then noticed later
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[relative] = status.st_mtime_ns
        prefix = f"{relative}/" if relative else ""
        names: list[str] = []
        special: list[str] = []
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    continue
                try:
                    is_folder = entry.is_dir()
                    is_file = entry.is_file() or entry.is_symlink()  # a dangling link too
                except OSError:  # a link to itself: the reader will tell
                    is_folder, is_file = False, True
                if is_folder:
                    waiting.append(prefix + entry.name)
                else:
                    (names if is_file else special).append(prefix + entry.name)
        waiting.sort(reverse=True)
        for listed, kind in ((names, None), (special, "special")):
            try:
                path = pl.Series("path", listed, pl.String)
            except UnicodeEncodeError as error:
                raise DataError(f"{place}: a file name is not UTF-8: {error.object!r}; rename it") from None
            frames.append(path.to_frame().with_columns(kind=pl.lit(kind, pl.String)))
    frame = pl.concat(frames)
    return _Listing(frame.with_columns(container="path", offset=pl.lit(0), encoding=pl.lit("file")), folders)


def _list_archive(kind: str, base: Path, name: str) -> pl.DataFrame:
    """One archive's members in storage order, with its name."""
    frame = OPENERS[kind](base / name).frame
    return frame.sort("offset", maintain_order=True).with_columns(container=pl.lit(name))


def _list_hdf5(package: Path) -> pl.DataFrame:
    """The datasets of group `bioscan_dataset`, or of the root where that group is absent."""
    return pl.concat(image_datasets(package, HDF5_GROUP, _BATCH), how="vertical")


def _archive(opener: Callable[[Path], pl.DataFrame]) -> Callable[[Path], _Listing]:
    return lambda package: _Listing(opener(package), {})


OPENERS: Final[dict[str, Callable[[Path], _Listing]]] = {
    "folder": _list_folder,
    "zip": _archive(list_zip),
    "tar": _archive(list_tar),
    "hdf5": _archive(_list_hdf5),
    "parquet": _archive(list_parquet),
}
"""Kind of package -> what lists its members."""
