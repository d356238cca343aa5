"""The bytes of one file over HTTP: asked for, gone on with, compared, counted; nothing is taken on trust.

A server may drop the connection, lie about the length, ignore or mistake a range, send a web page, ask for
patience, or trickle. Each of these is a failed try with a reason. What has arrived lies in a `Part`.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from html.parser import HTMLParser
from http import HTTPStatus
from io import FileIO
from pathlib import Path
from typing import Final
from urllib.parse import urlencode, urljoin, urlsplit

import requests
import urllib3

from bioscan import __version__
from bioscan.config import setting
from bioscan.errors import RequestError
from bioscan.files import locked, sync, writing

Meter = Callable[[int, int | None], None]
"""Is told the bytes that are there, and how many there will be."""
Notice = Callable[[str], None]
"""Is told what goes wrong on the way, one line at a time."""

_CHUNK: Final = 1 << 18
_LONGEST_PAGE: Final = 1 << 16
"""No more of a web page than this is looked at, bytes."""
_WORTHWHILE: Final = 1 << 20
"""Tries start to count anew when so many bytes more are there: a bad line that moves is not given up."""
_NO_ROOM: Final = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
_LATER: Final = (408, 425, 429, 500, 502, 503, 504)
"""Statuses that may be another one after a while."""


@dataclass(frozen=True, kw_only=True)
class DownloadSettings:
    """How patient a download is."""

    attempts: int = setting(6, "Tries of one mirror that bring nothing new before the next one is asked.")
    first_wait_s: float = setting(
        1.0, "Wait before the second try, seconds; doubled before each further one."
    )
    longest_wait_s: float = setting(
        120.0, "Longest wait before a try, seconds; a mirror that asks for a longer one is left."
    )
    timeout_s: float = setting(60.0, "Silence after which a connection is given up, seconds.")
    slowest: int = setting(1000, "Bytes per second; a connection slower than this for as long is given up.")
    overlap: int = setting(65536, "Bytes fetched again and compared where a download goes on.")

    def __post_init__(self) -> None:
        for name, low in (("attempts", 1), ("overlap", 1), ("first_wait_s", 0), ("slowest", 0)):
            if getattr(self, name) < low:
                raise RequestError(f"{name} is {getattr(self, name)}; it must be at least {low}")
        if self.timeout_s <= 0:
            raise RequestError(f"timeout_s is {self.timeout_s}; it must be above 0")


class MirrorError(Exception):
    """A failed try; the text is the reason.

    Attributes:
        final: Trying again is of no use.
        anew: What has arrived and what this mirror sends do not belong together: ask for the whole file.
        wait_s: Seconds that the mirror asks to wait.
    """

    def __init__(
        self, reason: str, *, final: bool = False, anew: bool = False, wait_s: float | None = None
    ) -> None:
        super().__init__(reason)
        self.final, self.anew, self.wait_s = final, anew, wait_s


@dataclass(frozen=True)
class Source:
    """Where the bytes of a part came from.

    Attributes:
        mirror: Name of the mirror that sent the last of them.
        total: Length of the whole file as that mirror says it, bytes.
        etag: Its validators …
        modified: … for the version that it sends.
        sha256: Checksum of the whole file as it states it.
    """

    mirror: str
    total: int | None = None
    etag: str | None = None
    modified: str | None = None
    sha256: str | None = None


class Part:
    """The bytes of a file that have arrived: on disk, with their source and checksums.

    Attributes:
        have: How many there are.
        source: Where they came from; None where that is not known.
        of_one: All of them were sent by one mirror to this process.
    """

    def __init__(self, path: Path, handle: FileIO, algorithms: tuple[str, ...]) -> None:
        self.path, self._handle, self._algorithms = path, handle, algorithms
        self.have = os.fstat(handle.fileno()).st_size
        self.source = _read_source(_record_of(path))
        self.of_one = False
        self._start_sums()

    def begin(self, source: Source | None) -> None:
        """Drop what is there; what comes next is the start of the file."""
        self._handle.truncate(0)
        self.have, self.of_one = 0, True
        self._start_sums()
        self._note(source)

    def go_on(self, source: Source) -> None:
        """What comes next follows what is there."""
        self.of_one = self.of_one and self.source is not None and self.source.mirror == source.mirror
        if source != self.source:
            self._note(source)

    def append(self, chunk: bytes) -> None:
        """Add bytes; a full disk is a RequestError and leaves what is there."""
        self._handle.seek(self.have)
        rest = memoryview(chunk)
        try:
            while rest:
                rest = rest[self._handle.write(rest) :]
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            raise RequestError(f"{os.strerror(error.errno)}; what has arrived is kept") from None
        self.have += len(chunk)
        for one in self._sums:
            one.update(chunk)
        self._summed += len(chunk)

    def read(self, start: int, length: int) -> bytes:
        """Bytes that are there."""
        self._handle.seek(start)
        pieces = bytearray()
        while len(pieces) < length and (piece := self._handle.read(length - len(pieces))):
            pieces += piece
        return bytes(pieces)

    def checksums(self, progress: Meter | None = None) -> dict[str, str]:
        """Algorithm -> hexadecimal checksum of what is there; bytes of an earlier run are read once."""
        while self._summed < self.have and (chunk := self.read(self._summed, _CHUNK)):
            for one in self._sums:
                one.update(chunk)
            self._summed += len(chunk)
            if progress:
                progress(self._summed, self.have)
        return {one.name: one.hexdigest() for one in self._sums}

    def place(self, target: Path) -> None:
        """Give the file its name, synced to the disk."""
        self._handle.close()
        sync(self.path)
        self.path.replace(target)
        sync(target.parent)
        _record_of(self.path).unlink(missing_ok=True)

    def _start_sums(self) -> None:
        self._sums = [hashlib.new(name, usedforsecurity=False) for name in self._algorithms]
        self._summed = 0

    def _note(self, source: Source | None) -> None:
        self.source = source
        if source is None:
            _record_of(self.path).unlink(missing_ok=True)
            return
        with writing(_record_of(self.path), overwrite=True) as partial:
            partial.write_text(json.dumps(dataclasses.asdict(source)) + "\n", encoding="utf-8")


@contextlib.contextmanager
def open_part(path: Path, algorithms: tuple[str, ...]) -> Iterator[Part]:
    """The part at `path`, made if needed, held against other processes; an empty one is gone afterwards.

    Raises:
        RequestError: another process holds it.
    """
    path.touch()
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(path))
        except BlockingIOError:
            raise RequestError("another process is fetching it") from None
        except OSError:  # a file system without locks
            pass
        part = Part(path, held.enter_context(FileIO(path, "r+")), algorithms)
        try:
            yield part
        finally:
            if not part.have:
                path.unlink(missing_ok=True)
                _record_of(path).unlink(missing_ok=True)


def _record_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _read_source(path: Path) -> Source | None:
    """The source noted beside a part; None where there is none or it cannot be understood."""
    try:
        source = Source(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    texts = (source.etag, source.modified, source.sha256)
    fine = isinstance(source.mirror, str) and all(text is None or isinstance(text, str) for text in texts)
    return source if fine and (source.total is None or type(source.total) is int) else None


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is asked of a mirror.

    Attributes:
        mirror: Its name.
        address: URL of the file.
        size: Length that the file must have, bytes; None: not known.
        joinable: Bytes of several mirrors may be joined, for a checksum decides in the end.
        end_shows: The file itself shows whether its end is there.
    """

    mirror: str
    address: str
    size: int | None
    joinable: bool
    end_shows: bool


def transfer(
    session: requests.Session,
    part: Part,
    wanted: Wanted,
    settings: DownloadSettings,
    *,
    progress: Meter | None = None,
    notice: Notice = lambda text: None,
) -> str | None:
    """Bring a part to its full length from one mirror, however many tries it takes, within limits.

    Returns:
        None when it is done, else why the mirror was given up.

    Raises:
        RequestError: the disk has no room.
    """
    tries, anew, best = 0, False, part.have
    while True:
        try:
            _attempt(session, part, wanted, settings, anew, progress, notice)
            return None
        except MirrorError as error:
            if error.final:
                return str(error)
            tries = 1 if part.have >= best + _WORTHWHILE else tries + 1
            anew, best = error.anew, max(best, part.have)
            if tries >= settings.attempts:
                return f"{error} ({tries} tries)" if tries > 1 else str(error)
            wait_s = min(settings.first_wait_s * 2 ** (tries - 1), settings.longest_wait_s)
            if error.wait_s is not None:
                wait_s = error.wait_s
            if wait_s > settings.longest_wait_s:
                return f"{error}, and asks to wait {wait_s:,.0f} s"
            notice(f"{wanted.mirror}: {error}; trying again in {wait_s:g} s")
            time.sleep(wait_s)


def _attempt(
    session: requests.Session,
    part: Part,
    wanted: Wanted,
    settings: DownloadSettings,
    anew: bool,
    progress: Meter | None,
    notice: Notice,
) -> None:
    """One request; ends well only when the part has its full length."""
    source = part.source
    same = source is not None and source.mirror == wanted.mirror
    total = source.total if wanted.size is None and source else wanted.size
    usable = (same or wanted.joinable) and not anew and (total is None or part.have <= total)
    if usable and part.have and part.have == total:
        return
    start = max(0, part.have - settings.overlap) if usable else 0
    # ranges are of the bytes as sent: an encoding on the way would make them another file's
    headers = {"Accept-Encoding": "identity", "User-Agent": f"bioscan/{__version__}"}
    if start:
        part.checksums(progress)  # now, not while the server waits
        headers["Range"] = f"bytes={start}-"
        if same and source and (validator := _strong(source)):
            headers["If-Range"] = validator
    with contextlib.closing(_open(session, wanted.address, headers, settings)) as response:
        if response.headers.get("Content-Encoding", "identity").lower() not in ("identity", ""):
            raise MirrorError("sends the file in another encoding, though asked not to")
        arriving = Source(
            wanted.mirror,
            total,
            response.headers.get("ETag"),
            response.headers.get("Last-Modified"),
            _stated_sha256(response),
        )
        chunks = _chunks(response, settings)
        if response.status_code == HTTPStatus.PARTIAL_CONTENT:
            _go_on(response, part, wanted, arriving, start, chunks, progress)
        else:
            _begin(response, part, wanted, arriving, chunks, progress, notice)


def _begin(
    response: requests.Response,
    part: Part,
    wanted: Wanted,
    arriving: Source,
    chunks: Iterator[bytes],
    progress: Meter | None,
    notice: Notice,
) -> None:
    """Take a whole file."""
    chunked = bool(getattr(response.raw, "chunked", False))
    length = None if chunked else _number(response.headers.get("Content-Length"))
    if wanted.size is not None and length not in (None, wanted.size):
        raise MirrorError(f"offers {length:,} bytes; published are {wanted.size:,}")
    first = next(chunks, b"")
    if re.match(rb"\s*<(!doctype html|html)\b", first, re.IGNORECASE):
        raise MirrorError("sends a web page instead of the file")
    if part.have:
        notice(f"{wanted.mirror}: sends it from the start; {part.have:,} bytes that had arrived are dropped")
    part.begin(dataclasses.replace(arriving, total=length if wanted.size is None else wanted.size))
    end = length if wanted.size is None else wanted.size
    _require_room(part, end)
    for chunk in _with_first(first, chunks):
        if end is not None and part.have + len(chunk) > end:
            raise MirrorError(f"sends more than {end:,} bytes", anew=True)
        part.append(chunk)
        if progress:
            progress(part.have, end)
    if end is not None and part.have < end:
        raise MirrorError(f"the connection ended after {part.have:,} of {end:,} bytes")
    if end is None and not (chunked or wanted.joinable or wanted.end_shows):
        raise MirrorError("does not say how long the file is", final=True)


def _go_on(
    response: requests.Response,
    part: Part,
    wanted: Wanted,
    arriving: Source,
    start: int,
    chunks: Iterator[bytes],
    progress: Meter | None,
) -> None:
    """Take the rest of a file, after comparing the overlap."""
    given = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", "").strip())
    if not given:
        raise MirrorError("sends a piece without saying which", anew=True)
    first, last, total = (int(number) for number in given.groups())
    length = _number(response.headers.get("Content-Length"))
    if not start or first != start or last >= total or length not in (None, last - first + 1):
        raise MirrorError(f"sends bytes {first:,} to {last:,}, asked for those from {start:,}", anew=True)
    before = part.source
    if arriving.total not in (None, total) or (
        before
        and before.mirror == arriving.mirror
        and (_differ(before.etag, arriving.etag) or _differ(before.modified, arriving.modified))
    ):
        raise MirrorError("the file there is another one than before", anew=True)
    overlap = part.read(start, part.have - start)
    noted = False
    for chunk in chunks:
        known = min(len(chunk), len(overlap))
        if chunk[:known] != overlap[:known]:
            raise MirrorError("what it sends does not follow what has arrived", anew=True)
        overlap, rest = overlap[known:], chunk[known:]
        if not rest:
            continue
        if part.have + len(rest) > last + 1:
            raise MirrorError(f"sends more than it announced, {last + 1 - first:,} bytes", anew=True)
        if not noted:
            part.go_on(dataclasses.replace(arriving, total=total))
            _require_room(part, total)
            noted = True
        part.append(rest)
        if progress:
            progress(part.have, total)
    if part.have < total:
        raise MirrorError(f"the connection ended after {part.have:,} of {total:,} bytes")


def _with_first(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    if first:
        yield first
    yield from rest


def _require_room(part: Part, total: int | None) -> None:
    """Raise a RequestError where the rest of a file has no room on the disk."""
    free = shutil.disk_usage(part.path.parent).free
    if total is not None and total - part.have > free:
        raise RequestError(f"{total - part.have:,} bytes are to come, {free:,} are free on the disk")


def _strong(source: Source) -> str | None:
    """A validator that `If-Range` may carry: a strong ETag, else the time of the last change."""
    strong = source.etag is not None and source.etag.startswith('"')
    return source.etag if strong else source.modified


def _differ(before: str | None, now: str | None) -> bool:
    return before is not None and now is not None and before != now


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"[0-9]{1,18}", text.strip()) else None


def _stated_sha256(response: requests.Response) -> str | None:
    """SHA-256 of the whole file as Hugging Face states it on the way to its storage; None elsewhere."""
    for answer in [*response.history, response]:
        stated = re.fullmatch(r'"?([0-9a-f]{64})"?', answer.headers.get("X-Linked-Etag", ""))
        if stated:
            return stated[1]
    return None


def _chunks(response: requests.Response, settings: DownloadSettings) -> Iterator[bytes]:
    """What a response brings, as it comes; a silent, slow or broken connection is a MirrorError."""
    response.raw.enforce_content_length = False  # who takes them counts them
    since, count = time.monotonic(), 0
    while True:
        try:
            # read1: a full read would wait for its last byte, however slowly the bytes come
            chunk = response.raw.read1(_CHUNK, decode_content=False)
        except urllib3.exceptions.ReadTimeoutError:
            raise MirrorError(f"silent for {settings.timeout_s:g} s") from None
        except (urllib3.exceptions.HTTPError, OSError, ValueError):
            raise MirrorError("the connection was lost") from None
        if not chunk:
            return
        count += len(chunk)
        elapsed = time.monotonic() - since
        if elapsed >= settings.timeout_s:
            if count < settings.slowest * elapsed:
                raise MirrorError(f"sends less than {settings.slowest:,} bytes per second")
            since, count = time.monotonic(), 0
        yield chunk


def _open(
    session: requests.Session, address: str, headers: Mapping[str, str], settings: DownloadSettings
) -> requests.Response:
    """The response with the file's bytes; a form to confirm a large file is filled in, as a person would."""
    response = _get(session, address, headers, settings)
    for _ in range(2):
        if not _is_page(response):
            return response
        with contextlib.closing(response):
            page = _read_page(response, settings)
            following = page.confirmation(response.url)
        if following is None:
            raise page.error()
        response = _get(session, following, headers, settings)
    response.close()
    raise MirrorError("asks again and again to confirm the download", final=True)


def _get(
    session: requests.Session, address: str, headers: Mapping[str, str], settings: DownloadSettings
) -> requests.Response:
    """A response of status 200 or 206."""
    try:
        response = session.get(address, headers=headers, stream=True, timeout=settings.timeout_s)
    except requests.Timeout:
        raise MirrorError(f"no answer within {settings.timeout_s:g} s") from None
    except requests.TooManyRedirects:
        raise MirrorError("redirects without end", final=True) from None
    except requests.ConnectionError as error:
        cause = re.search(r"\[Errno -?\d+\] ([^'\")]+)", str(error))
        refused = "CERTIFICATE_VERIFY_FAILED" in str(error)
        reason = "its certificate is not valid" if refused else cause[1] if cause else "the connection failed"
        raise MirrorError(reason, final=refused) from None
    except (requests.RequestException, urllib3.exceptions.HTTPError, ValueError) as error:
        # the last two: what a redirect to an address that is none ends in
        raise MirrorError(f"cannot be asked ({type(error).__name__})", final=True) from None
    hops = [answer.url for answer in [*response.history, response]]
    status = response.status_code
    if hops[0].startswith("https:") and not all(hop.startswith("https:") for hop in hops):
        reason = MirrorError("leads away from https", final=True)
    elif status in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
        return response
    elif status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        reason = MirrorError("has no such range", anew=True)
    elif status in _LATER:
        reason = MirrorError(_status(status), wait_s=_retry_after(response.headers.get("Retry-After")))
    elif _is_page(response) and (page := _read_page(response, settings)).quota:
        reason = page.error()
    else:
        reason = MirrorError(_status(status), final=True)
    response.close()
    raise reason


def _status(code: int) -> str:
    try:
        return f"answers {code} {HTTPStatus(code).phrase}"
    except ValueError:
        return f"answers {code}"


def _retry_after(text: str | None) -> float | None:
    """Seconds to wait, from a number of them or a date; None where nothing sensible is said."""
    number = _number(text)
    if number is not None or text is None:
        return number
    try:
        then = parsedate_to_datetime(text)
    except ValueError:
        return None
    then = then if then.tzinfo else then.replace(tzinfo=UTC)
    return max(0.0, (then - datetime.now(UTC)).total_seconds())


def _is_page(response: requests.Response) -> bool:
    return response.headers.get("Content-Type", "").lower().startswith(("text/html", "application/xhtml"))


def _read_page(response: requests.Response, settings: DownloadSettings) -> "_Page":
    content = bytearray()
    for chunk in _chunks(response, settings):
        content += chunk
        if len(content) >= _LONGEST_PAGE:
            break
    page = _Page()
    with contextlib.suppress(AssertionError):  # the parser's word for a declaration that it does not know
        page.feed(content[:_LONGEST_PAGE].decode("utf-8", "replace"))
    return page


class _Page(HTMLParser):
    """What matters of a web page that came instead of a file: its title, words, and Google Drive's form."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self.title = ""
        self.action: str | None = None
        self.fields: dict[str, str] = {}
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "title":
            self._inside = "title"
        elif tag == "form" and given.get("id") == "download-form":
            self._inside, self.action = "form", given.get("action", "")
        elif tag == "input" and self._inside == "form" and given.get("name"):
            self.fields[given["name"]] = given.get("value", "")

    def handle_endtag(self, tag: str) -> None:
        if tag == self._inside:
            self._inside = ""

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self._inside == "title":
            self.title += data

    @property
    def quota(self) -> bool:
        """Whether it says that too many people fetched the file of late."""
        text = " ".join(" ".join(self.words).split()).lower()
        return "quota exceeded" in text or "too many users have viewed or downloaded" in text

    def confirmation(self, address: str) -> str | None:
        """Where «Download anyway» leads; None where there is no such form, or it leads to a stranger."""
        if self.action is None or self.quota:
            return None
        try:
            leads_to = urljoin(address, self.action)
            host, here = urlsplit(leads_to), urlsplit(address)
        except ValueError:
            return None
        known = host.hostname == here.hostname or (host.hostname or "").endswith(".google.com")
        if not known or host.scheme != here.scheme:
            return None
        return f"{leads_to}{'&' if host.query else '?'}{urlencode(self.fields)}"

    def error(self) -> MirrorError:
        """Why there is no file."""
        if self.quota:
            return MirrorError("its download quota for this file is used up; try again tomorrow", final=True)
        title = "".join(c for c in " ".join(self.title.split()) if c.isprintable())[:80]
        return MirrorError(f"sends a web page instead of the file{f' («{title}»)' if title else ''}")
