"""`bioscan download`."""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from bioscan.app import output as out
from bioscan.app.flags import Json, Overwrite, SettingsFile, flags_of
from bioscan.config import layered
from bioscan.data.transfer import DownloadSettings
from bioscan.errors import RequestError

if TYPE_CHECKING:
    from bioscan.data.downloads import Download
    from bioscan.data.released_files import ReleasedFile
    from bioscan.data.transfer import Meter

Flags = flags_of(DownloadSettings)

MANY = 10
"""Files of one group that a list shows in one line unless they are asked for."""
WINDOW_S = 5.0
"""The rate shown is that of the last seconds."""


def run(
    *files: str,
    to: Path = Path(),
    list_: Annotated[bool, Parameter(name="--list", negative="")] = False,
    check: Annotated[bool, Parameter(negative="")] = False,
    mirror: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = (),
    base_url: str | None = None,
    config: SettingsFile = None,
    settings: Annotated[Flags | None, Parameter(name="*")] = None,  # type: ignore[valid-type]
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Fetch the files that BIOSCAN-1M was released as, or list them, or check those you have.

    What has arrived is kept when a download is cut off: the same command goes on with it. Length and MD5 are
    verified where they are published; other files end «not verifiable», with checksums to compare. A mirror
    that fails is tried again, then the next one is asked. What is there already is verified and not fetched.

    Args:
        files: File names (cropped_256.zip), groups (metadata, cropped_256, original_256, original_full …: one
            copy each), part folders (original_full:1-20,113) or patterns ('cropped_256.*').
        to: Folder for the files.
        list_: List these files, or all without names: size, MD5, mirrors; nothing is fetched.
        check: Read these files, or all that are in the folder, and compare; nothing is fetched.
        mirror: zenodo, huggingface or drive: ask only these, in this order.
        base_url: Your own copy: BASE_URL/FILE is asked instead of the mirrors, or before those of --mirror.
    """
    from bioscan.data.downloads import check_downloads, download, mirrors_of
    from bioscan.data.released_files import released

    if list_ and check:
        raise RequestError("--list and --check are two requests; give one")
    chosen = layered(DownloadSettings, file=config, table="download", flags=settings)
    if list_:
        listed = [(file, mirrors_of(file, mirror, base_url)) for file in released(files)]
        if json:
            out.show(out.to_json({"files": [as_dict(file) | {"mirrors": at} for file, at in listed]}))
        else:
            out.show(as_table(listed, collapsed=not files))
        return 0
    if not files and not check:
        raise RequestError("which files? Name files or groups; --list lists them")

    def tell(result: "Download") -> None:
        if not json:
            out.show(as_line(result))

    if check:
        results = check_downloads(files, to, metered=_metered)
        for result in results:
            tell(result)
    else:
        try:
            results = download(
                files,
                to,
                mirrors=mirror,
                base_url=base_url,
                settings=chosen,
                overwrite=overwrite,
                metered=_metered,
                notice=out.say,
                done=tell,
            )
        except KeyboardInterrupt:
            out.say("what has arrived is kept; the same command goes on with it")
            raise
    if json:
        out.show(out.to_json({"files": [vars(result) for result in results]}))
    elif not results:
        out.show("none of the released files is there")
    wrong = [result.name for result in results if not result.complete]
    if wrong:
        out.say(f"{len(wrong):,} of {len(results):,} files not complete: {', '.join(wrong)}")
    return 1 if wrong else 0


def as_dict(file: "ReleasedFile") -> dict[str, object]:
    """What is known of a released file, but for its mirrors."""
    keys = ("name", "group", "size", "about", "md5", "licence", "page")
    return {key: getattr(file, key) for key in keys}


def as_table(listed: "list[tuple[ReleasedFile, Mapping[str, str]]]", *, collapsed: bool) -> str:
    """Released files with size, MD5 and the mirrors to ask; a group of many in one line if wanted."""
    groups: dict[str, list[tuple[ReleasedFile, Mapping[str, str]]]] = {}
    for entry in listed:
        groups.setdefault(entry[0].group, []).append(entry)
    rows = []
    for group, members in groups.items():
        one = collapsed and len(members) > MANY
        for file, mirrors in members[:1] if one else members:
            size = f"{file.size:,}" if file.size else f"about {file.about}" if file.about else "–"
            places = ", ".join(mirrors) or (f"none; see {file.page}" if file.page else "none")
            name = f"{len(members)} files: {file.name} …" if one else file.name
            rows.append([group, name, size, file.md5 or "–", places])
    return out.table(rows, ["group", "file", "bytes", "MD5", "mirrors"])


def as_line(result: "Download") -> str:
    """One file's state, what it rests on, and its checksums."""
    state = f"complete, {result.state}" if result.complete else result.state
    parts = [f"{result.name}: {state}"]
    if result.complete:
        parts += [f"{result.size:,} bytes{f' from {result.mirror}' if result.mirror else ''}"]
    if result.detail:
        parts.append(result.detail)
    if result.complete:
        sums = (("MD5", result.md5), ("SHA-256", result.sha256))
        parts += [f"{name} {value}" for name, value in sums if value]
    return "; ".join(parts)


@contextmanager
def _metered(name: str) -> "Iterator[Meter]":
    """A progress bar in megabytes with the rate of the last seconds."""
    marks: deque[tuple[float, int]] = deque()
    with out.progress(name, "MB") as update:

        def meter(done: int, total: int | None) -> None:
            now = time.monotonic()
            if marks and done < marks[-1][1]:
                marks.clear()  # it began anew
            marks.append((now, done))
            while now - marks[0][0] > WINDOW_S:
                marks.popleft()
            since, before = marks[0]
            rate = (done - before) / 1e6 / (now - since) if now > since else 0.0
            update(done // 10**6, None if total is None else total // 10**6, **{"MB/s": f"{rate:.1f}"})

        yield meter
