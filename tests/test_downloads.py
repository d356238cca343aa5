"""Downloads against a real HTTP server that misbehaves by a script, one fault a request."""

import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import resource
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bioscan.data import downloads
from bioscan.data.downloads import Download, check_downloads, download, fetch, inspect, mirrors_of
from bioscan.data.released_files import GROUPS, MIRRORS, ONE_COPY, RELEASED, ReleasedFile, released
from bioscan.data.transfer import DownloadSettings
from bioscan.errors import RequestError

Run = Callable[..., tuple[int, str, str]]
Fault = tuple[str, Any]

HASTY = DownloadSettings(attempts=3, first_wait_s=0, timeout_s=5, overlap=16)
PART_7 = "bioscan_images_original_full_part7.zip"

QUOTA = """<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head><body>
<p class="uc-error-caption">Sorry, you can&#39;t view or download this file at this time.</p>
<p class="uc-error-subcaption">Too many users have viewed or downloaded this file recently.</p></body>"""
CONFIRM = """<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head><body>
<form id="download-form" action="{action}" method="get"><input type="submit" value="Download anyway"/>
<input type="hidden" name="id" value="1abc"><input type="hidden" name="export" value="download">
<input type="hidden" name="confirm" value="t"><input type="hidden" name="uuid" value="5f-0c&amp;d"></form>"""


# -- the server


@dataclass
class State:
    """What the server holds and does, and what it saw."""

    files: dict[str, bytes] = field(default_factory=dict)
    script: list[Fault] = field(default_factory=list)
    seen: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    sent: int = 0
    etags: bool = True
    watch: Callable[[], None] = lambda: None
    wrong: list[str] = field(default_factory=list)
    reached: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)

    @property
    def ranges(self) -> list[str | None]:
        return [headers.get("Range") for _, headers in self.seen]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Server"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        state = self.server.state
        state.seen.append((self.path, dict(self.headers)))
        state.watch()
        kind, value = state.script.pop(0) if state.script else ("good", None)
        try:
            getattr(self, kind)(value)
        except OSError:
            self.close_connection = True

    # what is sent

    @property
    def content(self) -> bytes:
        return self.server.state.files.get(self.path.partition("?")[0], b"")

    def start_of_range(self, content: bytes) -> int | None:
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked is None or self.headers.get("If-Range", etag(content)) != etag(content):
            return None
        return int(asked[1])

    def send(self, body: bytes, status: int = 200, count: int | None = None, /, **headers: str) -> None:
        """Headers and the first `count` bytes of a body; fewer than announced end the connection."""
        self.send_response(status)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in ({"Content-Length": str(len(body))} | given).items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        self.write(body if count is None else body[:count])
        self.close_connection = self.close_connection or count is not None

    def write(self, body: bytes) -> None:
        self.wfile.write(body)
        self.server.state.sent += len(body)

    def file(self, content: bytes, count: int | None = None, /, **headers: str) -> None:
        """The whole file or the range that is asked for."""
        if self.path.partition("?")[0] not in self.server.state.files:
            self.send(b"not here", 404)
            return
        if self.server.state.etags:
            headers = {"ETag": etag(content), **headers}
        start = self.start_of_range(content)
        if start is None:
            self.send(content, 200, count, **headers)
        elif start >= len(content):
            self.send(b"", 416, Content_Range=f"bytes */{len(content)}")
        else:
            place = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.send(content[start:], 206, count, **({"Content-Range": place} | headers))

    # what may happen

    def good(self, _: None) -> None:
        self.file(self.content)

    def drop(self, share: float) -> None:
        rest = len(self.content) - (self.start_of_range(self.content) or 0)
        self.file(self.content, int(share * rest))

    def reset(self, share: float) -> None:
        self.drop(share)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def longer(self, more: int) -> None:
        rest = len(self.content) - (self.start_of_range(self.content) or 0)
        self.file(self.content, rest, **{"Content-Length": str(rest + more)})

    def shorter(self, less: int) -> None:
        rest = len(self.content) - (self.start_of_range(self.content) or 0)
        self.file(self.content, max(0, rest - less), **{"Content-Length": str(max(0, rest - less))})

    def no_ranges(self, share: float) -> None:
        self.send(self.content, 200, int(share * len(self.content)), ETag=etag(self.content))

    def misplaced(self, shift: int) -> None:
        """A range, but not the one that was asked for, and it says so."""
        start = max(0, min((self.start_of_range(self.content) or 0) + shift, len(self.content) - 1))
        place = f"bytes {start}-{len(self.content) - 1}/{len(self.content)}"
        self.send(self.content[start:], 206, **{"Content-Range": place})

    def shifted(self, shift: int) -> None:
        """Bytes from another place under the right headers."""
        start = self.start_of_range(self.content) or 0
        place = f"bytes {start}-{len(self.content) - 1}/{len(self.content)}"
        moved = self.content[shift:] + self.content[:shift]
        self.send(moved[start:], 206 if start else 200, **{"Content-Range": place if start else ""})

    def status(self, code_and_patience: tuple[int, str]) -> None:
        code, patience = code_and_patience
        self.send(b"no", code, Retry_After=patience)

    def page(self, text: str) -> None:
        self.send(text.encode(), 200, Content_Type="text/html; charset=utf-8")

    def disguised_page(self, text: str) -> None:
        self.send(text.encode(), 200, Content_Type="application/octet-stream")

    def redirect(self, to: str) -> None:
        self.send(b"", 302, Location=to)

    def redirect_with_sha256(self, stated: str) -> None:
        self.send(b"", 302, Location=self.path, X_Linked_Etag=f'"{stated}"')

    def chunked(self, size_share_and_end: tuple[int, float, bytes]) -> None:
        """A share of the file in chunks of a size, then whatever stands for the end."""
        size, share, end = size_share_and_end
        content = self.content[: int(share * len(self.content))]
        self.send(b"", Content_Length="", Transfer_Encoding="chunked", ETag=etag(self.content))
        for start in range(0, len(content), size):
            piece = content[start : start + size]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        self.wfile.write(end)
        self.close_connection = True

    def until_closed(self, share: float) -> None:
        """No length: the end of the connection is the end of the file."""
        self.send(self.content, 200, int(share * len(self.content)), Content_Length="", Connection="close")

    def gzipped(self, _: None) -> None:
        self.file(gzip.compress(self.content), Content_Encoding="gzip")

    def other(self, content: bytes) -> None:
        """Another file of this name, this once."""
        self.file(content)

    def careless(self, _: None) -> None:
        """The range that is asked for, although the file is another one by now."""
        start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        place = f"bytes {start}-{len(self.content) - 1}/{len(self.content)}"
        named = {"Content-Range": place, "ETag": etag(self.content)}
        self.send(self.content[start:], 206, **named)

    def overlong(self, more: bytes) -> None:
        """The range that is asked for, in chunks, and then some."""
        start = self.start_of_range(self.content) or 0
        place = f"bytes {start}-{len(self.content) - 1}/{len(self.content)}"
        named = {"Content-Range": place, "Transfer-Encoding": "chunked", "Content-Length": ""}
        self.send(b"", 206, **named)
        for piece in (self.content[start:], more):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        self.wfile.write(b"0\r\n\r\n")

    def raw(self, answer: bytes) -> None:
        self.wfile.write(answer)
        self.close_connection = True

    def silent(self, share: float) -> None:
        """Part of the file, then nothing while the connection stays open."""
        self.send(self.content, 200, int(share * len(self.content)), ETag=etag(self.content))
        self.wfile.flush()
        self.server.state.reached.set()
        self.server.state.release.wait(20)

    def trickle(self, pause_s: float) -> None:
        self.send(self.content, 200, 0, ETag=etag(self.content))
        for place in range(len(self.content)):
            self.write(self.content[place : place + 1])
            if self.server.state.release.wait(pause_s):
                return


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.state = State()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that hangs up is none of the test's business

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


def etag(content: bytes) -> str:
    return f'"{hashlib.sha1(content, usedforsecurity=False).hexdigest()}"'


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    running.state = State()
    yield running
    running.state.release.set()


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def noise(length: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(length)


def archive(length: int, seed: int = 0) -> bytes:
    """A ZIP file with one stored member."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        file.writestr(zipfile.ZipInfo("a.jpg"), noise(length, seed))
    return made.getvalue()


def released_as(
    content: bytes, *paths: str, url: str = "", name: str = "file.bin", size: bool = True, sums: bool = True
) -> ReleasedFile:
    """A file of our own, on one mirror for each path."""
    return ReleasedFile(
        name=name,
        group="test",
        size=len(content) if size else None,
        md5=md5(content) if sums else None,
        mirrors={f"mirror{number}": url + path for number, path in enumerate(paths, start=1)},
    )


def held(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- the table


def test_the_table_has_each_file_once_and_only_facts_of_the_right_form() -> None:
    names = [file.name for file in RELEASED]
    assert len({*names}) == len(names) == 128  # 2 + 2 + 2 + 1 + 1 + 1 + 6 + 113
    addresses = [address for file in RELEASED for address in file.mirrors.values()]
    assert len({*addresses}) == len(addresses)
    for file in RELEASED:
        assert re.fullmatch(r"[\w.-]+", file.name)
        assert file.md5 is None or re.fullmatch(r"[0-9a-f]{32}", file.md5)
        assert list(file.mirrors) == [name for name in MIRRORS if name in file.mirrors]
        assert file.mirrors or file.page
        assert not (file.size and file.about)
        for mirror, address in file.mirrors.items():
            host = {"zenodo": "zenodo.org", "huggingface": "huggingface.co", "drive": "drive.google.com"}
            assert address.startswith(f"https://{host[mirror]}/")
            if mirror == "drive":
                assert re.fullmatch(r"https://drive\.google\.com/uc\?id=[\w-]{33}", address)
            else:
                assert address.endswith(f"/{file.name}")


def test_sizes_and_checksums_are_those_of_the_zenodo_record() -> None:
    known = {file.name: (file.size, file.md5) for file in RELEASED if "zenodo" in file.mirrors}
    assert known == {
        "BIOSCAN_Insect_Dataset_metadata.tsv": (1227580325, "dec3bb23870a35e2e13bc17a5809c901"),
        "original_256.zip": (26364230180, "9729fc1c49d84e7f1bfc6f5a0916d72b"),
        "cropped_256.zip": (7171212982, "fe1175815742db14f7372d505345284a"),
    }


def test_the_archives_of_full_size_hold_all_113_part_folders() -> None:
    for group, count in (("original_full", 113), ("cropped_full", 6)):
        files = released([group])
        assert len(files) == count
        held_parts = [n for f in files if f.parts for n in range(f.parts[0], f.parts[1] + 1)]
        assert held_parts == [*range(1, 114)]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["metadata"], ["BIOSCAN_Insect_Dataset_metadata.tsv"]),
        (["cropped_256"], ["cropped_256.zip"]),
        (["cropped_256.*"], ["cropped_256.zip", "cropped_256.hdf5"]),
        (["cropped_256.hdf5", "cropped_256.*"], ["cropped_256.hdf5", "cropped_256.zip"]),
        (["original_full:7"], [PART_7]),
        (["original_full:113,7-8,8"], [PART_7.replace("7", n) for n in ("113", "7", "8")]),
        (["cropped_full:20-21"], [f"bioscan_images_cropped_full_part{p}.zip" for p in ("1-20", "21-40")]),
    ],
)
def test_names_groups_parts_and_patterns_stand_for_files(names: list[str], expected: list[str]) -> None:
    assert [file.name for file in released(names)] == expected


def test_without_names_all_files_are_meant_and_every_group_has_one_copy() -> None:
    assert released() == RELEASED
    assert {*ONE_COPY.values()} <= {file.name for file in RELEASED if file.md5}
    assert [file for group in GROUPS for file in released([group])] == [
        file for file in RELEASED if file.name == ONE_COPY.get(file.group, file.name)
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("croped_256", "no released file or group 'croped_256'; did you mean 'cropped_256'?"),
        ("cropped_256.zipp", "did you mean 'cropped_256.zip'?"),
        ("original_ful:3", "did you mean 'original_full'?"),
        ("metadata:1", "unknown group of part folders 'metadata'"),
        ("original_full:0", "'0' is no part number and no span (1-113)"),
        ("original_full:112-114", "'112-114' is no part number"),
        ("original_full:3-2", "'3-2' is no part number"),
        ("original_full:", "'' is no part number"),
        ("nothing*", "no released file or group 'nothing*'"),
    ],
)
def test_a_name_that_stands_for_nothing_is_refused_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        released([name])


def test_own_mirrors_come_first_and_alone_unless_others_are_named() -> None:
    (file,) = released(["metadata"])
    own = "https://me:secret@lab.example/data/"
    assert [*mirrors_of(file)] == ["zenodo", "huggingface", "drive"]
    assert [*mirrors_of(file, ("drive", "zenodo"))] == ["drive", "zenodo"]
    assert [*mirrors_of(file, ("drive",), own)] == ["lab.example/data", "drive"]
    assert mirrors_of(file, (), own) == {"lab.example/data": own + file.name}
    assert mirrors_of(released(["original_full:1"])[0], ("zenodo",)) == {}
    with pytest.raises(RequestError, match="did you mean 'zenodo'"):
        mirrors_of(file, ("zenod",))
    for wrong in ("lab.example", "file:///data", "http://", "http://a/b?c=1"):
        with pytest.raises(RequestError, match="not the http"):
            mirrors_of(file, (), wrong)


# -- one file, one good mirror


def test_a_file_arrives_whole_under_its_name_and_nothing_is_left_beside_it(
    server: Server, tmp_path: Path
) -> None:
    content = noise(300_000)
    server.state.files = {"/a": content}
    told: list[tuple[int, int | None]] = []
    result = fetch(
        released_as(content, "/a", url=server.url),
        tmp_path,
        progress=lambda done, total: told.append((done, total)),
    )
    assert result == Download(
        name="file.bin",
        state="verified",
        size=300_000,
        md5=md5(content),
        mirror="mirror1",
        detail="size and MD5 are as published",
    )
    assert (tmp_path / "file.bin").read_bytes() == content
    assert held(tmp_path) == ["file.bin"]
    assert told == sorted(told)
    assert told[-1] == (300_000, 300_000)


def test_a_file_without_a_published_checksum_ends_not_verifiable_with_its_checksums(
    server: Server, tmp_path: Path
) -> None:
    content = archive(1000)
    server.state.files = {"/a": content}
    file = released_as(content, "/a", url=server.url, name="a.zip", size=False, sums=False)
    result = fetch(file, tmp_path)
    assert (result.state, result.complete) == ("not verifiable", True)
    assert result.detail == "no checksum is published"
    assert (result.md5, result.sha256) == (md5(content), hashlib.sha256(content).hexdigest())


def test_a_checksum_that_the_mirror_states_is_compared(server: Server, tmp_path: Path) -> None:
    content = archive(1000)
    sha256 = hashlib.sha256(content).hexdigest()
    server.state.files = {"/a": content}
    file = released_as(content, "/a", url=server.url, name="a.zip", size=False, sums=False)
    server.state.script = [("redirect_with_sha256", "0" * 64)]
    result = fetch(file, tmp_path)
    assert (result.state, held(tmp_path)) == ("failed", [])
    assert f"its SHA-256 is {sha256}; mirror1 states {'0' * 64}" in result.detail
    server.state.script = [("redirect_with_sha256", sha256)]
    result = fetch(file, tmp_path)
    assert result.state == "not verifiable"
    assert result.detail == "no checksum is published; SHA-256 is as mirror1 states it"


def test_memory_stays_small_however_large_the_file(server: Server, tmp_path: Path) -> None:
    content = bytes(32 << 20)
    server.state.files = {"/a": content}
    file = released_as(content, "/a", url=server.url)
    tracemalloc.start()
    assert fetch(file, tmp_path).state == "verified"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20, peak


# -- faults, one by one


def test_a_dropped_download_goes_on_where_it_was_and_compares_an_overlap(
    server: Server, tmp_path: Path
) -> None:
    content = noise(10_000)
    server.state.files = {"/a": content}
    server.state.script = [("drop", 0.5), ("reset", 0.5), ("drop", 0.1)]
    told: list[str] = []
    patient = DownloadSettings(attempts=4, first_wait_s=0, overlap=16)
    result = fetch(released_as(content, "/a", url=server.url), tmp_path, settings=patient, notice=told.append)
    assert result.state == "verified"
    assert (tmp_path / "file.bin").read_bytes() == content
    assert server.state.ranges[:2] == [None, "bytes=4984-"]  # 5,000 less the overlap
    assert all(headers["If-Range"] == etag(content) for _, headers in server.state.seen[1:])
    assert server.state.sent <= 10_000 + 3 * 16
    assert told[0] == (
        "file.bin: mirror1: the connection ended after 5,000 of 10,000 bytes; trying again in 0 s"
    )


FAULTS: dict[str, tuple[list[Fault], str]] = {
    "longer": ([("longer", 7)], "offers 3,007 bytes; published are 3,000"),
    "shorter": ([("shorter", 7)], "offers 2,993 bytes; published are 3,000"),
    "ranges ignored": ([("drop", 0.5), ("no_ranges", 1)], "1,500 bytes that had arrived are dropped"),
    "misplaced range": ([("drop", 0.5), ("misplaced", -3)], "sends bytes 1,481 to 2,999, asked for those fr"),
    "unasked range": ([("misplaced", 3)], "sends bytes 3 to 2,999, asked for those from 0"),
    "shifted bytes": ([("drop", 0.5), ("shifted", 5)], "does not follow what has arrived"),
    "too long a range": ([("drop", 0.5), ("overlong", b"abc")], "sends more than it announced, 1,516 bytes"),
    "500": ([("status", (500, ""))], "answers 500 Internal Server Error"),
    "503": ([("status", (503, "0"))], "answers 503 Service Unavailable"),
    "429": ([("status", (429, "0"))], "answers 429 Too Many Requests"),
    "416": ([("drop", 0.5), ("status", (416, ""))], "has no such range"),
    "web page": ([("page", "<html><title>Back \x1b[31m soon</title>")], "instead of the file («Back [31m so"),
    "chunks end early": ([("chunked", (100, 0.5, b"0\r\n\r\n"))], "ended after 1,500 of 3,000 bytes"),
    "chunks cut": ([("chunked", (100, 0.5, b"64\r\nabc"))], "the connection was lost"),
    "chunks without end": ([("chunked", (100, 1.0, b""))], "the connection was lost"),
    "chunks too many": ([("chunked", (100, 1.0, b"3\r\nabc\r\n0\r\n\r\n"))], "sends more than 3,000 bytes"),
    "bad chunk size": ([("chunked", (100, 0.5, b"xyz\r\n"))], "the connection was lost"),
    "cut, no length": ([("until_closed", 0.5)], "ended after 1,500 of 3,000 bytes"),
    "gzip": ([("gzipped", None)], "sends the file in another encoding, though asked not to"),
    "another file": ([("other", noise(3000, 1))], "published is"),
    "another length": ([("other", noise(2999, 1))], "offers 2,999 bytes; published are 3,000"),
    "nothing": ([("drop", 0.0)], "the connection ended after 0 of 3,000 bytes"),
    "another rest": ([("drop", 0.5), ("other", noise(3000, 1))], "bytes that had arrived are dropped"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_after_each_fault_the_file_is_the_right_one(fault: str, server: Server, tmp_path: Path) -> None:
    script, message = FAULTS[fault]
    content = noise(3000)
    server.state.files = {"/a": content, "/b": content}
    server.state.script = [*script]
    told: list[str] = []
    file = released_as(content, "/a", "/b", url=server.url)
    result = fetch(file, tmp_path, settings=HASTY, notice=told.append)
    assert result.state == "verified", result
    assert (tmp_path / "file.bin").read_bytes() == content
    assert held(tmp_path) == ["file.bin"]
    assert any(message in text for text in told), told
    assert all(text.isprintable() for text in told)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (("status", (404, "")), "mirror1: answers 404 Not Found; given up"),
        (("status", (403, "")), "answers 403 Forbidden; given up"),
        (("page", QUOTA), "its download quota for this file is used up; try again tomorrow; given up"),
        (
            ("page", CONFIRM.format(action="http://stranger.invalid/")),
            "(«Google Drive - Virus scan warning»)",
        ),
        (("page", CONFIRM.format(action="https://127.0.0.1:1/")), "(«Google Drive - Virus scan warning»)"),
        (("status", (429, "3600")), "429 Too Many Requests, and asks to wait 3,600 s; given up"),
        (("redirect", "ftp://127.0.0.1/a"), "cannot be asked (InvalidSchema); given up"),
    ],
)
def test_a_mirror_that_will_not_give_the_file_is_left_for_the_next(
    fault: Fault, message: str, server: Server, tmp_path: Path
) -> None:
    content = noise(3000)
    server.state.files = {"/b": content}
    server.state.script = [fault]
    told: list[str] = []
    file = released_as(content, "/a", "/b", url=server.url)
    result = fetch(file, tmp_path, settings=HASTY, notice=told.append)
    assert (result.state, result.mirror) == ("verified", "mirror2")
    assert any(message in text for text in told), told
    assert [path for path, _ in server.state.seen].count("/b") == 1


def test_a_web_page_that_calls_itself_data_is_no_file(server: Server, tmp_path: Path) -> None:
    content = archive(3000)
    server.state.files = {"/a": content}
    server.state.script = [("drop", 0.5), ("disguised_page", "\n<!DOCTYPE html><p>Back soon")]
    told: list[str] = []
    file = released_as(content, "/a", url=server.url, name="a.zip", size=False, sums=False)
    assert fetch(file, tmp_path, settings=HASTY, notice=told.append).complete
    assert "sends a web page instead of the file" in told[1]
    assert server.state.ranges[2] == f"bytes={len(content) // 2 - 16}-"  # what had arrived was kept


def test_redirects_without_end_and_a_server_that_is_gone_are_said(server: Server, tmp_path: Path) -> None:
    server.state.script = [("redirect", "/a")] * 40
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{free.getsockname()[1]}/a"
    file = ReleasedFile(name="file.bin", group="test", mirrors={"round": server.url + "/a", "gone": gone})
    result = fetch(file, tmp_path, settings=HASTY)
    assert (result.state, held(tmp_path)) == ("failed", [])
    assert result.detail == "round: redirects without end; gone: Connection refused (3 tries)"


def test_certificates_count_and_a_way_out_of_https_is_not_taken(
    server: Server, tmp_path: Path, oracle: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    made = ["-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([oracle("openssl"), "req", "-x509", *made, *subject], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    secure = Server()
    secure.socket = context.wrap_socket(secure.socket, server_side=True)
    thread = threading.Thread(target=secure.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    content = archive(100)
    secure.state.files = server.state.files = {"/a": content}
    address = f"https://localhost:{secure.server_address[1]}"
    file = released_as(content, "/a", url=address, name="a.zip", size=False, sums=False)
    try:
        result = fetch(file, tmp_path / "new", settings=HASTY)
        assert result.detail == "mirror1: its certificate is not valid"
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        secure.state.script = [("redirect", f"{server.url}/a")]
        result = fetch(file, tmp_path / "new", settings=HASTY)
        assert result.detail == "mirror1: leads away from https"
        assert fetch(file, tmp_path / "new", settings=HASTY).complete
    finally:
        secure.shutdown()
        secure.server_close()
        thread.join()


def test_the_form_that_drive_shows_for_large_files_is_filled_in(server: Server, tmp_path: Path) -> None:
    content = archive(3000)
    server.state.files = {"/uc": content, "/download": content}
    server.state.script = [
        ("page", CONFIRM.format(action="/download")),
        ("drop", 0.5),
        ("page", CONFIRM.format(action="/download")),
    ]
    file = released_as(content, "/uc?id=1abc", url=server.url, name="a.zip", size=False, sums=False)
    assert fetch(file, tmp_path, settings=HASTY).state == "not verifiable"
    assert (tmp_path / "a.zip").read_bytes() == content
    confirmed = "/download?id=1abc&export=download&confirm=t&uuid=5f-0c%26d"
    assert [path for path, _ in server.state.seen] == ["/uc?id=1abc", confirmed] * 2
    assert server.state.ranges[3] == f"bytes={len(content) // 2 - 16}-"


def test_a_form_that_comes_back_for_ever_ends(server: Server, tmp_path: Path) -> None:
    server.state.script = [("page", CONFIRM.format(action="/a"))] * 9
    result = fetch(released_as(b"abc", "/a", url=server.url), tmp_path, settings=HASTY)
    assert result.detail == "mirror1: asks again and again to confirm the download"
    assert len(server.state.seen) == 3


@pytest.mark.parametrize("patience", ["1", "date"])
def test_the_wait_that_a_busy_mirror_asks_for_is_kept(patience: str, server: Server, tmp_path: Path) -> None:
    content = noise(100)
    server.state.files = {"/a": content}
    said = formatdate(time.time() + 2, usegmt=True) if patience == "date" else patience  # whole seconds
    server.state.script = [("status", (429, said))]
    began = time.monotonic()
    result = fetch(released_as(content, "/a", url=server.url), tmp_path, settings=HASTY)
    assert result.state == "verified"
    assert 0.9 < time.monotonic() - began < 3


def test_a_silent_and_a_trickling_connection_are_given_up(server: Server, tmp_path: Path) -> None:
    content = noise(2000)
    server.state.files = {"/a": content}
    server.state.script = [("silent", 0.5), ("trickle", 0.02)]
    told: list[str] = []
    hasty = DownloadSettings(attempts=3, first_wait_s=0, timeout_s=0.2, slowest=1000, overlap=16)
    result = fetch(released_as(content, "/a", url=server.url), tmp_path, settings=hasty, notice=told.append)
    server.state.release.set()
    assert result.state == "verified"
    assert "silent for 0.2 s" in told[0]
    assert "sends less than 1,000 bytes per second" in told[2]


def test_a_slow_line_that_moves_is_not_given_up(server: Server, tmp_path: Path) -> None:
    content = noise(3 << 20)
    server.state.files = {"/a": content}
    server.state.script = [("drop", 0.4), ("drop", 0.6)]  # 1.2 MB each time
    once = DownloadSettings(attempts=2, first_wait_s=0)
    assert fetch(released_as(content, "/a", url=server.url), tmp_path, settings=once).state == "verified"
    server.state.script = [("drop", 0.01)] * 2
    (tmp_path / "file.bin").unlink()
    result = fetch(released_as(content, "/a", url=server.url), tmp_path, settings=once)
    assert result.detail.endswith("bytes (2 tries)")


def test_a_file_that_changed_between_two_requests_is_fetched_anew(server: Server, tmp_path: Path) -> None:
    before, after = archive(3000, 1), archive(3000, 2)
    assert len(before) == len(after)
    server.state.files = {"/a": after}
    file = released_as(after, "/a", url=server.url, name="a.zip", size=False, sums=False)
    for etags in (True, False):  # without ETags the overlap shows it
        server.state.etags = etags
        server.state.script = [("other", before)]
        server.state.files["/a"] = before
        server.state.script = [("drop", 0.5)]
        assert fetch(file, tmp_path, settings=DownloadSettings(attempts=1, overlap=16)).state == "failed"
        server.state.files["/a"] = after
        assert fetch(file, tmp_path, settings=HASTY).state == "not verifiable"
        assert (tmp_path / "a.zip").read_bytes() == after
        (tmp_path / "a.zip").unlink()


def test_a_changed_file_shows_by_its_etag_even_if_the_server_sends_the_range(
    server: Server, tmp_path: Path
) -> None:
    after = noise(3000)
    before = noise(1000, 1) + after[1000:]  # the overlap does not show it
    file = released_as(after, "/a", url=server.url, size=False, sums=False)
    server.state.files = {"/a": before}
    server.state.script = [("drop", 0.5)]
    assert fetch(file, tmp_path, settings=DownloadSettings(attempts=1, overlap=16)).state == "failed"
    server.state.files["/a"] = after
    server.state.script = [("careless", None)]
    told: list[str] = []
    assert fetch(file, tmp_path, settings=HASTY, notice=told.append).complete
    assert (tmp_path / "file.bin").read_bytes() == after
    assert "the file there is another one than before" in told[0]


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKS_FOLLOW = OK + b"Transfer-Encoding: chunked\r\n\r\n"
ODD_ANSWERS = [
    b"",
    b"nothing like HTTP\r\n\r\n",
    OK,
    b"HTTP/1.1 -1 X\r\n\r\n",
    b"HTTP/1.1 99999 X\r\n\r\n",
    b"HTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.1 599 X\r\n\r\n",
    OK + b"X: y\r\n" * 300 + b"\r\n",
    OK + b"X: " + b"y" * 100_000 + b"\r\n\r\n",
    *(OK + b"Content-Length: " + n + b"\r\n\r\nabc" for n in (b"-5", b"5, 7", b"\xb2", b"9" * 30, b"0")),
    OK + b"Content-Length: 5\r\nContent-Length: 7\r\n\r\nabc",
    OK + b"ETag: \xff\xfe\r\nContent-Length: 3\r\n\r\nabc",
    CHUNKS_FOLLOW + b"-5\r\nabc\r\n",
    CHUNKS_FOLLOW + b"f" * 20 + b"\r\nabc\r\n",
    b"HTTP/1.1 206 X\r\nContent-Range: bytes 9-2/3\r\nContent-Length: 3\r\n\r\nabc",
    *(
        b"HTTP/1.1 429 X\r\nRetry-After: " + t + b"\r\n\r\n"
        for t in (b"soon", b"-3", b"9" * 30, b"Wed, 99 Foo")
    ),
    OK + b"Content-Type: text/html\r\n\r\n<title>x</title><![x[ <![",
    OK + b'Content-Type: text/html\r\n\r\n<form id="download-form" action="http://[">',
    *(
        b"HTTP/1.1 302 X\r\nContent-Length: 0\r\nLocation: " + to + b"\r\n\r\n"
        for to in (
            b"http://[",
            b"http://.a/",
            b"http://" + b"a" * 300,
            b"http://\xed\xa0\x80/",
            b"http://h:x/",
            b"//",
        )
    ),
]


@pytest.mark.parametrize("answer", ODD_ANSWERS, ids=lambda answer: repr(answer[:60]))
def test_no_answer_is_odd_enough_to_end_the_program(answer: bytes, server: Server, tmp_path: Path) -> None:
    content = archive(100)
    server.state.files = {"/b": content}
    server.state.script = [("raw", answer)]
    file = released_as(content, "/a", "/b", url=server.url, name="a.zip", size=False, sums=False)
    result = fetch(file, tmp_path, settings=HASTY)
    assert (result.state, result.mirror) == ("not verifiable", "mirror2"), result
    assert (tmp_path / "a.zip").read_bytes() == content


def test_a_file_whose_end_cannot_be_told_is_not_taken(server: Server, tmp_path: Path) -> None:
    content = archive(3000)
    server.state.files = {"/a": content}
    for name, end_shows in (("a.ckpt", False), ("a.zip", True)):
        file = released_as(content, "/a", url=server.url, name=name, size=False, sums=False)
        for share in (0.5, 1.0):
            server.state.script = [("until_closed", share)]
            result = fetch(file, tmp_path, settings=HASTY)
            assert result.complete == (end_shows and share == 1), result
    assert held(tmp_path) == [".a.ckpt.part", ".a.ckpt.part.json", "a.zip"]


def test_what_has_no_room_on_the_disk_is_not_begun(server: Server, tmp_path: Path) -> None:
    server.state.files = {"/a": archive(100)}
    server.state.script = [("longer", 10**15)]
    file = released_as(b"", "/a", url=server.url, name="a.zip", size=False, sums=False)
    result = fetch(file, tmp_path, settings=HASTY)
    assert re.match(r"1,000,000,000,000,\d+ bytes are to come, [\d,]+ are free on the disk", result.detail)
    assert held(tmp_path) == []
    huge = ReleasedFile(name="b.zip", group="test", size=10**15, mirrors={"a": server.url})
    with pytest.raises(RequestError, match="1,000,000,000,000,000 bytes are to come"):
        downloads._require_room(tmp_path, [huge], overwrite=False)


# -- several mirrors, several runs


def test_bytes_of_two_mirrors_are_joined_where_the_checksum_decides(server: Server, tmp_path: Path) -> None:
    content = noise(3000)
    server.state.files = {"/a": content, "/b": content}
    server.state.script = [("drop", 0.5), ("status", (404, ""))]
    file = released_as(content, "/a", "/b", url=server.url)
    result = fetch(file, tmp_path, settings=HASTY)
    assert (result.state, result.mirror) == ("verified", "mirror2")
    assert server.state.seen[2][1]["Range"] == "bytes=1484-"
    assert "If-Range" not in server.state.seen[2][1]  # its validator is another mirror's
    assert server.state.sent < 3000 + 100


def test_a_joined_file_that_is_wrong_is_fetched_whole_from_the_same_mirror(
    server: Server, tmp_path: Path
) -> None:
    content = noise(3000)
    spoilt = noise(1000, 1) + content[1000:]  # the overlap does not show it
    server.state.files = {"/a": spoilt, "/b": content}
    server.state.script = [("drop", 0.5), ("status", (404, ""))]
    told: list[str] = []
    file = released_as(content, "/a", "/b", url=server.url)
    result = fetch(file, tmp_path, settings=HASTY, notice=told.append)
    assert (result.state, result.mirror) == ("verified", "mirror2")
    assert server.state.ranges == [None, "bytes=1484-", "bytes=1484-", None]
    assert any(re.search(r"its MD5 is \w+; published is \w+; deleted", text) for text in told)


def test_bytes_of_two_mirrors_are_never_joined_without_a_checksum(server: Server, tmp_path: Path) -> None:
    before, after = archive(3000, 1), archive(3000, 2)
    server.state.files = {"/a": before, "/b": after}
    server.state.script = [("drop", 0.5), ("status", (404, ""))]
    file = released_as(after, "/a", "/b", url=server.url, name="a.zip", size=False, sums=False)
    assert fetch(file, tmp_path, settings=HASTY).mirror == "mirror2"
    assert (tmp_path / "a.zip").read_bytes() == after
    assert server.state.ranges[-1] is None


def test_a_wrong_file_is_deleted_and_said_and_the_next_mirror_asked(server: Server, tmp_path: Path) -> None:
    content = noise(3000)
    server.state.files = {"/a": noise(3000, 1), "/b": noise(3000, 2)}
    told: list[str] = []
    file = released_as(content, "/a", "/b", url=server.url)
    result = fetch(file, tmp_path, settings=HASTY, notice=told.append)
    assert (result.state, result.size, held(tmp_path)) == ("failed", 0, [])
    assert result.detail == (
        f"mirror1: its MD5 is {md5(noise(3000, 1))}; published is {md5(content)}; "
        f"mirror2: its MD5 is {md5(noise(3000, 2))}; published is {md5(content)}"
    )
    assert [text.split(": ")[-1].split("; ")[-1] for text in told] == ["deleted", "given up"] * 2


@pytest.mark.parametrize("record", [None, "", "[]", '{"mirror": 3}', '{"mirror": "mirror1", "total": "x"}'])
def test_a_part_of_unknown_source_is_used_only_where_the_checksum_decides(
    record: str | None, server: Server, tmp_path: Path
) -> None:
    content = archive(3000)
    server.state.files = {"/a": content}
    for sums in (False, True):
        (tmp_path / ".a.zip.part").write_bytes(content[:1000])
        if record is not None:
            (tmp_path / ".a.zip.part.json").write_text(record)
        file = released_as(content, "/a", url=server.url, name="a.zip", size=sums, sums=sums)
        assert fetch(file, tmp_path, settings=HASTY).complete
        assert (tmp_path / "a.zip").read_bytes() == content
        assert server.state.ranges[-1] == ("bytes=984-" if sums else None)
        (tmp_path / "a.zip").unlink()


@pytest.mark.parametrize("length", [3000, 3001])
def test_a_part_of_full_length_or_more_needs_no_bytes_or_all(
    length: int, server: Server, tmp_path: Path
) -> None:
    content = noise(3000)
    server.state.files = {"/a": content}
    (tmp_path / ".file.bin.part").write_bytes((content + b"x")[:length])
    result = fetch(released_as(content, "/a", url=server.url), tmp_path, settings=HASTY)
    assert result.state == "verified"
    assert server.state.ranges == ([] if length == 3000 else [None])


def test_a_file_that_is_there_is_verified_and_not_fetched(server: Server, tmp_path: Path) -> None:
    content = noise(3000)
    server.state.files = {"/a": content}
    file = released_as(content, "/a", url=server.url)
    (tmp_path / "file.bin").write_bytes(content)
    assert fetch(file, tmp_path).state == "verified"
    (tmp_path / "file.bin").write_bytes(content[::-1])
    result = fetch(file, tmp_path)
    assert (result.state, result.mirror) == ("bad", None)
    assert (tmp_path / "file.bin").read_bytes() == content[::-1]
    assert server.state.seen == []
    assert fetch(file, tmp_path, overwrite=True).state == "verified"
    assert (tmp_path / "file.bin").read_bytes() == content


def test_a_file_that_is_there_needs_no_mirror(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_bytes(archive(100))
    file = ReleasedFile(name="a.xlsx", group="test", page="https://lab.example/")
    assert fetch(file, tmp_path).state == "not verifiable"
    assert fetch(file, tmp_path / "new").detail == "no address of it is known; see https://lab.example/"


def test_an_older_file_stays_until_the_new_one_is_complete(server: Server, tmp_path: Path) -> None:
    content = noise(3000)
    server.state.files = {"/a": content}
    (tmp_path / "file.bin").write_bytes(b"older")
    once = DownloadSettings(attempts=1)
    server.state.script = [("drop", 0.5)]
    file = released_as(content, "/a", url=server.url)
    assert fetch(file, tmp_path, settings=once, overwrite=True).state == "failed"
    assert (tmp_path / "file.bin").read_bytes() == b"older"
    assert fetch(file, tmp_path, settings=once, overwrite=True).state == "verified"


def test_two_at_once_do_not_write_one_file(server: Server, tmp_path: Path) -> None:
    content = noise(3000)
    server.state.files = {"/a": content}
    server.state.script = [("silent", 0.5)]
    file = released_as(content, "/a", url=server.url)
    first = threading.Thread(target=fetch, args=(file, tmp_path), kwargs={"settings": HASTY})
    first.start()
    assert server.state.reached.wait(10)
    second = fetch(file, tmp_path, settings=HASTY)
    assert (second.state, second.detail) == ("failed", "another process is fetching it")
    server.state.release.set()
    first.join()
    assert (tmp_path / "file.bin").read_bytes() == content


def test_proxies_and_netrc_of_the_environment_are_used(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = noise(100)
    address = "http://lab.invalid/a"
    server.state.files = {address: content}  # a proxy is asked by the whole address
    netrc = tmp_path / "netrc"
    netrc.write_text("machine lab.invalid login me password secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert fetch(released_as(content, address), tmp_path, settings=HASTY).state == "verified"
    assert server.state.seen[0][1]["Authorization"] == "Basic bWU6c2VjcmV0"


# -- laws

CHUNKS = st.tuples(st.integers(1, 500), st.floats(0, 1), st.sampled_from([b"0\r\n\r\n", b"", b"zz"]))
PLAIN = st.one_of(
    st.tuples(st.sampled_from(["drop", "reset"]), st.floats(0, 1)),
    st.tuples(st.just("no_ranges"), st.floats(0, 1)),
    st.tuples(st.just("longer"), st.integers(1, 50)),
    st.tuples(st.just("misplaced"), st.integers(-50, 50)),
    st.tuples(st.just("status"), st.tuples(st.sampled_from([404, 416, 429, 500, 503]), st.just("0"))),
    st.tuples(st.sampled_from(["page", "disguised_page"]), st.sampled_from([QUOTA, "<html>Hello</html>"])),
    st.tuples(st.just("page"), st.just(CONFIRM.format(action="/a"))),
    st.tuples(st.just("chunked"), CHUNKS),
    st.tuples(st.just("gzipped"), st.none()),
    st.tuples(st.just("redirect"), st.sampled_from(["/a", "/b", "/nowhere"])),
)
"""Faults that show without a checksum."""
TREACHEROUS = st.one_of(
    st.tuples(st.just("shorter"), st.integers(1, 50)),
    st.tuples(st.just("shifted"), st.integers(1, 50)),
    st.tuples(st.just("until_closed"), st.floats(0, 1)),
    st.tuples(st.just("other"), st.integers(0, 3000).map(lambda length: noise(length, 9))),
)


@pytest.mark.parametrize("kind", ["size and MD5", "MD5", "none"])
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)
@given(data=st.data())
def test_whatever_happens_the_name_stands_only_for_the_right_bytes(
    kind: str, running: Server, data: st.DataObject
) -> None:
    content = archive(data.draw(st.integers(0, 3000), label="length"), seed=3)
    faults = PLAIN if kind == "none" else PLAIN | TREACHEROUS
    running.state = state = State(files={"/a": content, "/b": content})
    state.script = data.draw(st.lists(faults, max_size=8), label="script")
    state.etags = data.draw(st.booleans(), label="etags")
    file = released_as(
        content, "/a", "/b", url=running.url, name="a.zip", size=kind[:4] == "size", sums=kind != "none"
    )
    overlap = data.draw(st.integers(1, 100), label="overlap")
    hasty = DownloadSettings(attempts=2, first_wait_s=0, timeout_s=5, overlap=overlap)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        target = folder / "a.zip"

        def watch() -> None:
            if target.exists() and target.read_bytes() != content:
                state.wrong.append("the name stands for wrong bytes")

        state.watch = watch
        for _ in range(len(state.script) + 2):  # each run takes at least one fault, the last none
            result = fetch(file, folder, settings=hasty)
            watch()
            assert result.complete == target.exists(), result
            if result.complete:
                break
        assert state.wrong == []
        assert result.complete, result
        assert target.read_bytes() == content
        assert held(folder) == ["a.zip"]


# -- what shows that a file is cut short


def zips() -> dict[str, bytes]:
    made = {"stored": archive(300), "empty": archive_of({}), "two": archive_of({"a": b"1" * 50, "b": b"2"})}
    commented = io.BytesIO()
    with zipfile.ZipFile(commented, "w") as file:
        file.writestr("a", "text")
        file.comment = b"PK\5\6 is no end"
    made["commented"] = commented.getvalue()
    many = io.BytesIO()
    with zipfile.ZipFile(many, "w") as file:  # more than a plain end record can count: ZIP64
        for number in range(65_536):
            file.writestr(zipfile.ZipInfo(f"{number}"), b"")
    made["zip64"] = many.getvalue()
    assert b"PK\6\6" in made["zip64"]
    return made


def archive_of(members: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        for name, content in members.items():
            file.writestr(zipfile.ZipInfo(name), content)
    return made.getvalue()


def test_every_cut_through_a_zip_file_shows() -> None:
    for name, whole in zips().items():
        assert downloads._zip_fault(io.BytesIO(whole), len(whole)) is None, name
        step = max(1, len(whole) // 200)
        for length in {*range(1, len(whole), step), *range(len(whole) - 130, len(whole))} - {0}:
            if length > 0:
                cut = io.BytesIO(whole[:length])
                assert downloads._zip_fault(cut, length) is not None, (name, length)
        missing_start = whole[10:]
        if name == "two":  # a hole in the central directory
            holed = whole[:-40] + whole[-30:]
            assert downloads._zip_fault(io.BytesIO(holed), len(holed)) is not None
        if name != "empty":
            assert downloads._zip_fault(io.BytesIO(missing_start), len(missing_start)) is not None, name


@pytest.mark.parametrize("version", ["earliest", "v110", "latest"])
def test_every_cut_through_an_hdf5_file_shows(version: str, tmp_path: Path) -> None:
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w", libver=version) as file:
        file.create_group("bioscan_dataset").create_dataset("a.jpg", data=np.frombuffer(noise(900), np.uint8))
    whole = path.read_bytes()
    assert downloads._hdf5_fault(io.BytesIO(whole), len(whole)) is None
    for length in range(1, len(whole)):
        assert downloads._hdf5_fault(io.BytesIO(whole[:length]), length) is not None, length
    path.write_bytes(whole[:-1])
    with pytest.raises(OSError, match="truncated"):  # the library agrees
        h5py.File(path)


def test_every_cut_through_a_json_array_shows() -> None:
    whole = json.dumps([{"order": f"[{n}]"} for n in range(40)], indent=4).encode() + b"\n"
    assert downloads._json_fault(io.BytesIO(whole), len(whole)) is None
    for length in range(1, len(whole) - 1):
        assert (downloads._json_fault(io.BytesIO(whole[:length]), length) is None) == (
            whole[:length].endswith(b"]")  # a text may end so; no record of the released file does
        )


# -- check


def test_check_tells_what_is_there(tmp_path: Path) -> None:
    hdf5 = tmp_path / "cropped_256.hdf5"
    with h5py.File(hdf5, "w") as file:
        file["a.jpg"] = np.zeros(100, np.uint8)
    (tmp_path / "cropped_256.zip").write_bytes(b"not it")
    (tmp_path / "CLIBD_partitioning.zip").write_bytes(archive(10))
    (tmp_path / ".original_256.zip.part").write_bytes(b"begun")
    (tmp_path / "notes.txt").write_text("mine")
    clibd, content = md5(archive(10)), hdf5.read_bytes()
    known = {r.name: (r.state, r.size, r.detail) for r in check_downloads([], tmp_path)}
    assert known == {
        "cropped_256.zip": ("bad", 6, "6 bytes; published are 7,171,212,982"),
        "cropped_256.hdf5": ("not verifiable", len(content), "no checksum is published"),
        "original_256.zip": ("partial", 5, "5 of 26,364,230,180 bytes have arrived"),
        "CLIBD_partitioning.zip": (
            "bad",
            len(archive(10)),
            f"its MD5 is {clibd}; published is fc08444a47d1533d99a892287e174cc1",
        ),
    }
    assert [r.state for r in check_downloads(["metadata", "original_256"], tmp_path)] == [
        "missing",
        "partial",
    ]
    hdf5.write_bytes(content[:-1])
    (result,) = check_downloads(["cropped_256.hdf5"], tmp_path)
    assert (result.state, result.detail) == (
        "bad",
        f"an HDF5 file cut short: {len(content) - 1:,} of {len(content):,} bytes",
    )
    for odd in (b"", b"x" * 100):
        hdf5.write_bytes(odd)
        assert check_downloads(["cropped_256.hdf5"], tmp_path)[0].state == "bad"
    hdf5.unlink()
    hdf5.mkdir()
    assert inspect(released(["cropped_256.hdf5"])[0], tmp_path).detail == "not a file"
    with pytest.raises(RequestError, match="no such folder"):
        check_downloads([], tmp_path / "nowhere")


# -- the command line


def test_the_list_names_every_file_and_its_mirrors(run_bioscan: Run) -> None:
    status, shown, err = run_bioscan("download", "--list")
    assert (status, err) == (0, "")
    lines = shown.splitlines()
    assert lines[0].split() == ["group", "file", "bytes", "MD5", "mirrors"]
    assert len(lines) == 1 + 15 + 1  # the 113 parts in one line
    assert "113 files: bioscan_images_original_full_part1.zip …" in lines[-1]
    assert re.search(r"cropped_256.hdf5 +about 7.41 GB +– +huggingface, drive$", shown, re.MULTILINE)
    assert "none; see https://drive.google.com/drive/folders/" in shown
    status, shown, _ = run_bioscan("download", "--list", "original_full")
    assert len(shown.splitlines()) == 1 + 113
    status, shown, _ = run_bioscan("download", "--list", "--json")
    files = json.loads(shown)["files"]
    assert [file["name"] for file in files] == [file.name for file in RELEASED]
    assert files[0]["mirrors"] == dict(RELEASED[0].mirrors)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which files? Name files or groups; --list lists them"),
        (["--list", "--check"], "--list and --check are two requests; give one"),
        (["croped_256"], "did you mean 'cropped_256'?"),
        (["metadata", "--mirror", "drve"], "unknown mirror 'drve'; did you mean 'drive'?"),
        (["metadata", "--base-url", "data"], "base URL 'data' is not the http(s) address of a folder"),
        (["metadata", "--attempts", "0"], "attempts is 0; it must be at least 1"),
        (["metadata", "--timeout-s", "0"], "timeout_s is 0.0; it must be above 0"),
        (["--check", "--to", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_a_wrong_request_is_one_line_and_touches_nothing(
    arguments: list[str], message: str, run_bioscan: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, shown, err = run_bioscan("download", *arguments)
    assert (status, shown, err.count("\n")) == (2, "", 1), err
    assert message in err
    assert held(tmp_path) == []


def test_one_file_that_fails_does_not_stop_the_others_and_is_listed(
    server: Server, run_bioscan: Run, tmp_path: Path
) -> None:
    content = archive(5000)
    server.state.files = {f"/data/{PART_7}": content, f"/data/{PART_7.replace('7', '9')}": content}
    command = ["download", "original_full:7-9", "--to", tmp_path / "new", "--base-url", server.url + "/data/"]
    status, shown, err = run_bioscan(*command)
    assert status == 1
    host = server.url.removeprefix("http://") + "/data"
    whole = f"complete, not verifiable; {len(content):,} bytes"
    sums = f"no checksum is published; MD5 {md5(content)}; SHA-256 {hashlib.sha256(content).hexdigest()}"
    eight = PART_7.replace("7", "8")
    assert shown.splitlines() == [
        f"{PART_7}: {whole} from {host}; {sums}",
        f"{eight}: failed; {host}: answers 404 Not Found",
        f"{PART_7.replace('7', '9')}: {whole} from {host}; {sums}",
    ]
    assert err.splitlines()[-1] == f"1 of 3 files not complete: {eight}"
    status, shown, err = run_bioscan(*command[:1], "original_full:7,9", *command[2:], "--json")
    assert (status, err) == (0, "")
    facts = json.loads(shown)["files"]
    assert [(f["state"], f["mirror"], f["size"]) for f in facts] == [
        ("not verifiable", None, len(content))
    ] * 2
    assert len(server.state.seen) == 3  # nothing was fetched again


def test_check_exits_1_where_a_file_is_not_complete(run_bioscan: Run, tmp_path: Path) -> None:
    assert run_bioscan("download", "--check", "--to", tmp_path) == (
        0,
        "none of the released files is there\n",
        "",
    )
    (tmp_path / PART_7).write_bytes(archive(100))
    status, shown, err = run_bioscan("download", "--check", "--to", tmp_path)
    assert (status, err) == (0, "")
    assert shown.startswith(f"{PART_7}: complete, not verifiable; ")
    status, shown, err = run_bioscan("download", "--check", "metadata", "original_full:7", "--to", tmp_path)
    assert (status, shown.splitlines()[0]) == (1, "BIOSCAN_Insect_Dataset_metadata.tsv: missing")
    assert err == "1 of 2 files not complete: BIOSCAN_Insect_Dataset_metadata.tsv\n"


def test_a_file_without_an_address_says_where_to_look(run_bioscan: Run, tmp_path: Path) -> None:
    status, shown, _ = run_bioscan("download", "low_quality", "--to", tmp_path)
    assert status == 1
    assert "failed; no address of it is known; see https://drive.google.com/drive/folders/" in shown
    assert held(tmp_path) == []


# -- processes that end early


def begin_process(server: Server, folder: Path, **more: Any) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "bioscan", "download", PART_7, "--to", str(folder)]
    return subprocess.Popen(
        [*command, "--base-url", server.url, "--overlap", "16", "--attempts", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_download_that_is_stopped_goes_on_where_it_was(
    number: signal.Signals, server: Server, tmp_path: Path
) -> None:
    content = archive(400_000)
    server.state.files = {f"/{PART_7}": content}
    server.state.script = [("silent", 0.5)]
    process = begin_process(server, tmp_path)
    assert server.state.reached.wait(20)
    part = tmp_path / f".{PART_7}.part"
    ends = time.monotonic() + 20
    while not (part.exists() and part.stat().st_size == len(content) // 2):
        assert time.monotonic() < ends
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    server.state.release.set()
    expected = {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}
    assert process.returncode == expected[number], err
    assert "Traceback" not in err
    if number == signal.SIGINT:
        assert err == "what has arrived is kept; the same command goes on with it\ninterrupted\n"
    assert held(tmp_path) == [part.name, f"{part.name}.json"]
    again = begin_process(server, tmp_path)
    shown, err = again.communicate(timeout=20)
    assert (again.returncode, err) == (0, "")
    assert (tmp_path / PART_7).read_bytes() == content
    assert held(tmp_path) == [PART_7]
    assert server.state.ranges == [None, f"bytes={len(content) // 2 - 16}-"]
    assert hashlib.sha256(content).hexdigest() in shown


def test_a_full_disk_keeps_what_has_arrived_and_says_so(server: Server, tmp_path: Path) -> None:
    def small_files_only() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    content = archive(400_000)
    server.state.files = {f"/{PART_7}": content}
    process = begin_process(server, tmp_path, preexec_fn=small_files_only)
    shown, err = process.communicate(timeout=20)
    assert process.returncode == 1, err
    assert shown == f"{PART_7}: failed; File too large; what has arrived is kept\n"
    assert "Traceback" not in err
    process = begin_process(server, tmp_path)
    process.communicate(timeout=20)
    assert process.returncode == 0
    assert (tmp_path / PART_7).read_bytes() == content
    assert server.state.ranges == [None, f"bytes={200_000 - 16}-"]


def test_progress_is_shown_on_a_terminal_in_megabytes_with_the_rate(server: Server, tmp_path: Path) -> None:
    content = archive(3_000_000)
    server.state.files = {f"/{PART_7}": content}
    server.state.script = [("silent", 0.9)]
    ours, theirs = os.openpty()
    os.set_blocking(ours, False)
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "bioscan",
            "download",
            PART_7,
            "--to",
            str(tmp_path),
            "--base-url",
            server.url,
        ],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=os.environ | {"COLUMNS": "200", "TERM": "xterm"},
    )
    os.close(theirs)
    shown = b""
    ends = time.monotonic() + 20
    while not re.search(rb"2/3.*MB/s \d", shown) and time.monotonic() < ends:
        with contextlib.suppress(BlockingIOError, OSError):
            shown += os.read(ours, 65536)
        time.sleep(0.05)
    process.kill()
    process.communicate()
    os.close(ours)
    server.state.release.set()
    assert PART_7.encode() in shown
    assert re.search(rb"2/3.*MB/s \d", shown), shown[-500:]


def test_downloads_of_the_library_give_a_list_and_tell_each_result(server: Server, tmp_path: Path) -> None:
    content = archive(50)
    server.state.files = {f"/{PART_7}": content}
    told: list[Download] = []
    results = download([PART_7], tmp_path, base_url=server.url, done=told.append)
    assert results == told
    assert [(r.name, r.state) for r in results] == [(PART_7, "not verifiable")]
