"""The COCO downloader against a small, ill-behaved COCO server on this machine's loopback.

Every oracle is what the server holds: its bytes are compared with what ended on the disk.
"""

import errno
import inspect
import io
import json
import re
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import zipfile
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import download
from download import DownloadError, download_coco, fetch, unzip

FAST = {"tries": 4, "timeout": 0.3, "backoff": 0.001}
BODY = b"".join(sha256(bytes([i % 256, i // 256])).digest() for i in range(6250))  # 200 kB
OTHER_BODY = BODY[::-1]
IDS = [30, 4, 17, 8, 25]  # as in COCO, neither consecutive nor in the order of the file


class Server(ThreadingHTTPServer):
    """Serves `files` as a good server does, unless `faults[path]` says what to do instead, once."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files, self.faults, self.requests = {}, {}, []
        self.stalled, self.release = threading.Event(), threading.Event()
        self.validators = lambda body: {"ETag": f'"{sha256(body).hexdigest()}"'}

    def handle_error(self, request, client_address):
        pass  # a client that hangs up is part of the game

    def asked(self, path=None):
        return [request for request in self.requests if path in (None, request["path"])]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server, path = self.server, self.path
        server.requests.append({"path": path, **{key: self.headers[key] for key in ASKS}})
        faults = server.faults.get(path, [])
        fault = faults.pop(0) if faults else serve_well
        fault(self, server.files.get(path))

    def answer(self, status, body=b"", length=None, **headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)


ASKS = ("Range", "If-Range")


def serve_well(handler, body):
    """RFC 9110: a range only if If-Range still holds, 416 if it begins behind the end."""
    if body is None:
        return handler.answer(404)
    tags = handler.server.validators(body)
    start = re.fullmatch(r"bytes=(\d+)-", handler.headers["Range"] or "")
    if not start or handler.headers["If-Range"] not in tags.values():
        return handler.answer(200, body, **tags)
    serve_piece(handler, body, int(start[1]))


def serve_piece(handler, body, start):
    """The rest of the file, without a look at If-Range."""
    if start >= len(body):
        return handler.answer(416, Content_Range=f"bytes */{len(body)}")
    span = f"bytes {start}-{len(body) - 1}/{len(body)}"
    tags = handler.server.validators(body)
    handler.answer(206, body[start:], Content_Range=span, **tags)


def truncate(handler, body, at=None):
    sent = body[: len(body) // 2 if at is None else at]
    handler.answer(200, sent, len(body), **handler.server.validators(body))


def stall(handler, body):
    truncate(handler, body)
    handler.wfile.flush()
    handler.server.stalled.set()
    handler.server.release.wait(5)


def reset(handler, body):
    truncate(handler, body)
    abort = struct.pack("ii", 1, 0)  # linger for 0 seconds: the connection ends with a RST
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, abort)
    handler.connection.close()


def hang_up(handler, body):
    handler.connection.shutdown(socket.SHUT_RDWR)


def ignore_range(handler, body):
    handler.answer(200, body, **handler.server.validators(body))


def ignore_if_range(handler, body):
    serve_piece(handler, body, int(re.findall(r"\d+", handler.headers["Range"] or "0")[0]))


def wrong_piece(handler, body):
    tags = handler.server.validators(body)
    handler.answer(206, body[7:], Content_Range=f"bytes 7-{len(body) - 1}/{len(body)}", **tags)


def short_piece(handler, body):
    start, end = len(body) // 2, len(body) - 9
    span, tags = f"bytes {start}-{end - 1}/{len(body)}", handler.server.validators(body)
    handler.answer(206, body[start:end], Content_Range=span, **tags)


def fail(handler, body):
    handler.answer(500)


def promise_too_much(handler, body):
    tags = handler.server.validators(body)
    handler.answer(200, body, len(body) + 10, **tags)


def send_too_much(handler, body):
    handler.answer(200, body + b"surplus", len(body), **handler.server.validators(body))


def no_length(handler, body):
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(body)


def web_page(handler, body):
    handler.answer(200, b"<html>Please sign in</html>", Content_Type="text/html; charset=utf-8")


def redirect(target):
    return lambda handler, body: handler.answer(302, Location=target)


@contextmanager
def serving():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.release.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with serving() as server:
        server.files["/file"] = BODY
        yield server


def fetch_file(server, folder, **options):
    return fetch(f"{server.url}/file", folder / "file", **{**FAST, **options})


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


# fetch: what arrives is what the server has


def test_a_file_arrives_whole_and_alone(tmp_path, server):
    """The bytes are the server's, missing folders are made, and no helper file stays behind."""
    path = fetch(f"{server.url}/file", tmp_path / "new" / "folder" / "file", **FAST)
    assert path.read_bytes() == BODY
    assert names(path.parent) == ["file"]


def test_a_complete_file_is_not_asked_for_again(tmp_path, server):
    """A file under its final name is complete, so the server hears nothing of it."""
    (tmp_path / "file").write_bytes(b"from before")
    assert fetch_file(server, tmp_path).read_bytes() == b"from before"
    assert server.asked() == []


@pytest.mark.parametrize("at", [0, 1, 2**16, len(BODY) - 1])
def test_a_cut_answer_is_continued_where_it_ended(tmp_path, server, at):
    """After a cut the next try asks for the missing bytes only, and names the version it has."""
    server.faults["/file"] = [lambda handler, body: truncate(handler, body, at)]
    assert fetch_file(server, tmp_path).read_bytes() == BODY
    tag = server.validators(BODY)["ETag"]
    asked = (f"bytes={at}-", tag) if at else (None, None)
    assert (server.asked()[1]["Range"], server.asked()[1]["If-Range"]) == asked


@pytest.mark.parametrize("fault", [stall, reset, hang_up, fail])
def test_a_passing_failure_is_survived(tmp_path, server, fault):
    """A stall, a reset or closed connection and a server error are each tried once more."""
    server.faults["/file"] = [fault]
    assert fetch_file(server, tmp_path).read_bytes() == BODY
    assert len(server.asked()) == 2


def test_a_stall_keeps_what_arrived_before_it(tmp_path, server):
    """The try after a stall resumes; it does not begin again."""
    server.faults["/file"] = [stall]
    fetch_file(server, tmp_path)
    assert int(server.asked()[1]["Range"][6:-1]) >= 2**16


def test_a_later_call_resumes(tmp_path, server):
    """When the tries are used up, the partial file waits for the next call and is named."""
    server.faults["/file"] = [truncate]
    with pytest.raises(DownloadError, match="file.part is kept and resumed"):
        fetch_file(server, tmp_path, tries=1)
    assert names(tmp_path) == ["file.part", "file.part.tag"]
    assert fetch_file(server, tmp_path).read_bytes() == BODY
    assert server.asked()[1]["Range"] == f"bytes={len(BODY) // 2}-"


def test_a_server_without_ranges_starts_over(tmp_path, server):
    """An answer of 200 to a Range request is the whole file, and replaces the part."""
    server.faults["/file"] = [truncate, ignore_range]
    assert fetch_file(server, tmp_path).read_bytes() == BODY


@pytest.mark.parametrize("second", [wrong_piece, short_piece])
def test_only_the_missing_piece_is_appended(tmp_path, server, second):
    """A piece that begins or ends elsewhere than asked is thrown away with the part."""
    server.faults["/file"] = [truncate, second]
    assert fetch_file(server, tmp_path).read_bytes() == BODY
    assert [request["Range"] for request in server.asked()] == [None, "bytes=100000-", None]


@pytest.mark.parametrize("second", [serve_well, ignore_if_range, wrong_piece])
def test_two_versions_are_never_spliced(tmp_path, server, second):
    """A file that changes between tries arrives in its new version, whatever the server answers."""

    def cut_and_change(handler, body):
        handler.server.files["/file"] = OTHER_BODY + b"longer"
        truncate(handler, body)

    server.faults["/file"] = [cut_and_change, second]
    assert fetch_file(server, tmp_path).read_bytes() == OTHER_BODY + b"longer"


def test_a_date_serves_where_there_is_no_etag(tmp_path, server):
    """Last-Modified vouches for the version just as well."""
    date = "Wed, 21 Oct 2015 07:28:00 GMT"
    server.validators = lambda body: {"Last-Modified": date}
    server.faults["/file"] = [truncate]
    assert fetch_file(server, tmp_path).read_bytes() == BODY
    assert server.asked()[1]["If-Range"] == date


@pytest.mark.parametrize("tags", [{}, {"ETag": 'W/"weak"'}])
def test_without_a_reliable_tag_nothing_is_resumed(tmp_path, server, tags):
    """If the server cannot say that the file is the same, every byte is asked for again."""
    server.validators = lambda body: tags
    server.faults["/file"] = [truncate]
    assert fetch_file(server, tmp_path).read_bytes() == BODY
    assert server.asked()[1]["Range"] is None


def test_a_part_without_its_tag_is_not_trusted(tmp_path, server):
    """Bytes of unknown origin are overwritten."""
    (tmp_path / "file.part").write_bytes(b"something else")
    assert fetch_file(server, tmp_path).read_bytes() == BODY


def test_a_part_longer_than_the_file_starts_over(tmp_path, server):
    """416 says that the part is no beginning of the file: it is dropped."""
    (tmp_path / "file.part").write_bytes(BODY + b"too long")
    (tmp_path / "file.part.tag").write_text(server.validators(BODY)["ETag"])
    assert fetch_file(server, tmp_path).read_bytes() == BODY
    assert len(server.asked()) == 2


def test_surplus_bytes_are_not_stored(tmp_path, server):
    """What follows the announced length is not part of the file."""
    server.faults["/file"] = [send_too_much]
    assert fetch_file(server, tmp_path).read_bytes() == BODY


@given(
    st.lists(
        st.sampled_from(
            [truncate, reset, hang_up, fail, ignore_range, ignore_if_range, wrong_piece]
        )
    ),
    st.integers(0, 4),
)
@settings(max_examples=20, deadline=None, derandomize=True, database=None)
def test_under_any_misfortune_the_file_is_right_or_absent(faults, change_at):
    """Whatever a server does and whenever its file changes, no wrong file gets the final name."""
    with tempfile.TemporaryDirectory() as folder, serving() as server:

        def with_change(fault, index):
            def act(handler, body):
                if index == change_at:
                    body = handler.server.files["/file"] = OTHER_BODY
                fault(handler, body)

            return act

        server.files["/file"] = BODY
        server.faults["/file"] = [with_change(fault, i) for i, fault in enumerate(faults)]
        try:
            arrived = fetch_file(server, Path(folder), tries=6, quiet=True).read_bytes()
        except DownloadError:
            assert not (Path(folder) / "file").exists()
        else:
            assert arrived == server.files["/file"]


# fetch: what it refuses, in one sentence that names address, file and remedy


def test_a_missing_file_is_said_at_once(tmp_path, server):
    """404 will not pass, so there is one request and a message that says where to look."""
    with pytest.raises(DownloadError, match="/absent for file .* 404 .*: check the year"):
        fetch(f"{server.url}/absent", tmp_path / "file", **FAST)
    assert len(server.asked()) == 1 and names(tmp_path) == []


def test_the_tries_are_counted_and_spaced(tmp_path, server, monkeypatch):
    """A server that stays broken is asked `tries` times, with growing pauses."""
    pauses = []
    monkeypatch.setattr(download.time, "sleep", pauses.append)
    server.faults["/file"] = [fail] * 9
    with pytest.raises(DownloadError, match="in 4 tries .*500.*: check the network"):
        fetch_file(server, tmp_path, backoff=1)
    assert len(server.asked()) == 4
    assert pauses == [0, 1, 3, 7]


def test_no_network_is_said(tmp_path):
    """If nobody answers, the message names the address and the network."""
    with socket.socket() as unused:  # bound but not listening: connections are refused
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/file"
        with pytest.raises(DownloadError, match=f"{url} .*refused.*: check the network"):
            fetch(url, tmp_path / "file", **FAST)


@pytest.mark.parametrize(
    "url", ["file:///etc/hostname", "ftp://127.0.0.1/x", "data:,x", "", "None"]
)
def test_only_web_addresses_are_fetched(tmp_path, url):
    """No other scheme is opened, not even to look."""
    with pytest.raises(DownloadError, match="give an http or https address"):
        fetch(url, tmp_path / "file", **FAST)
    assert names(tmp_path) == []


@pytest.mark.parametrize("target", ["file:///etc/hostname", "data:,x"])
def test_a_redirect_away_from_the_web_is_refused(tmp_path, server, target):
    """A server cannot send the client to the client's own disk."""
    server.faults["/file"] = [redirect(target)] * 9
    with pytest.raises(DownloadError):
        fetch_file(server, tmp_path)
    assert names(tmp_path) == []


def test_a_redirect_to_ftp_is_not_even_tried(tmp_path, server):
    """Nobody knocks at the door of the ftp server that a redirect names."""
    with socket.create_server(("127.0.0.1", 0)) as ftp:
        server.faults["/file"] = [redirect(f"ftp://127.0.0.1:{ftp.getsockname()[1]}/file")] * 9
        with pytest.raises(DownloadError):
            fetch_file(server, tmp_path)
        ftp.setblocking(False)
        with pytest.raises(BlockingIOError):
            ftp.accept()


def test_a_redirect_within_the_web_is_followed(tmp_path, server):
    """A mirror may move its files."""
    server.faults["/old"] = [redirect("/file")]
    assert fetch(f"{server.url}/old", tmp_path / "file", **FAST).read_bytes() == BODY


def test_a_promise_of_more_bytes_is_never_believed(tmp_path, server):
    """If fewer bytes come than announced, again and again, there is an error and no file."""
    server.faults["/file"] = [promise_too_much] * 9
    with pytest.raises(DownloadError, match="4 tries .*200,000 of 200,010 bytes|4 tries .*416"):
        fetch_file(server, tmp_path)
    assert not (tmp_path / "file").exists()


def test_the_size_is_bounded(tmp_path, server):
    """More than `max_bytes` is refused before anything is written; exactly that much is not."""
    with pytest.raises(DownloadError, match="offers 200,000 bytes .* for file, limit 199,999"):
        fetch_file(server, tmp_path, max_bytes=len(BODY) - 1)
    assert names(tmp_path) == []
    assert fetch_file(server, tmp_path, max_bytes=len(BODY)).read_bytes() == BODY


@pytest.mark.parametrize("fault", [no_length, web_page])
def test_what_cannot_be_the_file_is_refused(tmp_path, server, fault):
    """A sign-in page is not the file, and without a length nobody knows whether it is whole."""
    server.faults["/file"] = [fault]
    with pytest.raises(DownloadError, match="file, .*sign in"):
        fetch_file(server, tmp_path)
    assert names(tmp_path) == []


class FullDisk(io.FileIO):
    """A file on a disk with 70,000 bytes left."""

    def write(self, data):
        if self.tell() + len(data) > 70_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


def test_a_full_disk_is_said_and_the_part_resumed(tmp_path, server, monkeypatch):
    """A full disk is no network failure: one try, a clear remedy, and later the rest alone."""
    with monkeypatch.context() as patch:
        patch.setattr(download, "open", FullDisk, raising=False)
        with pytest.raises(DownloadError, match="No space left .* is kept: free space"):
            fetch_file(server, tmp_path)
    assert len(server.asked()) == 1
    assert (tmp_path / "file.part").read_bytes() == BODY[: 2**16]
    assert fetch_file(server, tmp_path).read_bytes() == BODY
    assert server.asked()[1]["Range"] == "bytes=65536-"


# unzip


def make_zip(path, members, compression=zipfile.ZIP_DEFLATED):
    """`members`: {name or ZipInfo: bytes}."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def link(name, target="/etc"):
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return {info: target}


def refused(zip_path, folder, match, **limits):
    """Assert that `unzip` gives up with its zip kept and not one file written anywhere."""
    folder.mkdir(exist_ok=True)
    before = names(folder.parent)
    with pytest.raises(DownloadError, match=match) as caught:
        unzip(zip_path, folder, **limits)
    assert str(zip_path) in str(caught.value) and "\n" not in str(caught.value)
    assert names(folder.parent) == before


def test_a_zip_unfolds_and_goes(tmp_path):
    """Its members arrive with their bytes, the zip and the hidden folder are gone."""
    members = {"train2017/a.jpg": b"a" * 99, "train2017/b.jpg": b"", "annotations/c.json": b"{}"}
    unzip(make_zip(tmp_path / "some.zip", members), tmp_path / "root")
    assert [name for name in names(tmp_path / "root") if "." in name] == sorted(members)
    for name, content in members.items():
        assert (tmp_path / "root" / name).read_bytes() == content
    assert names(tmp_path)[0] == "root"


def test_an_earlier_partial_folder_is_completed(tmp_path):
    """Files that the zip does not know stay, those that it knows become its own."""
    (tmp_path / "train2017").mkdir()
    (tmp_path / "train2017" / "mine.txt").write_text("keep me")
    (tmp_path / "train2017" / "a.jpg").write_bytes(b"half wri")
    unzip(
        make_zip(tmp_path / "z.zip", {"train2017/a.jpg": b"a", "train2017/b.jpg": b"b"}), tmp_path
    )
    content = {path.name: path.read_bytes() for path in (tmp_path / "train2017").iterdir()}
    assert content == {"mine.txt": b"keep me", "a.jpg": b"a", "b.jpg": b"b"}


def test_the_remains_of_a_killed_run_are_not_adopted(tmp_path):
    """Half a file that a killed run left in the hidden folder does not reach the dataset."""
    scratch = tmp_path / ".z.zip.unzipping" / "train2017"
    scratch.mkdir(parents=True)
    (scratch / "old.jpg").write_bytes(b"half")
    unzip(make_zip(tmp_path / "z.zip", {"train2017/a.jpg": b"a"}), tmp_path)
    assert names(tmp_path) == ["train2017", "train2017/a.jpg"]


OUTSIDE = ["../x", "/x", "a/../../x", "C:/x", "C:x", "a\\..\\..\\x", "./x", "a//x", "..", "a\nb"]


@pytest.mark.parametrize("name", [*OUTSIDE, "a/" * 500 + "x"])
def test_a_member_may_not_leave_the_folder(tmp_path, name):
    """No name that could point elsewhere on any system is unfolded, nor is its neighbour."""
    members = {"train2017/a.jpg": b"a", name: b"escaped"}
    refused(make_zip(tmp_path / "z.zip", members), tmp_path / "root", "member")


def test_a_link_is_refused(tmp_path):
    """A link could lead the next member out of the folder."""
    path = make_zip(tmp_path / "z.zip", {**link("train2017"), "train2017/a.jpg": b"a"})
    refused(path, tmp_path / "root", "'train2017' is a link")


def test_an_encrypted_member_is_refused(tmp_path):
    """The flag alone is enough."""
    path = make_zip(tmp_path / "z.zip", {"a.jpg": b"a"})
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(raw)
    refused(path, tmp_path / "root", "encrypted")


def test_a_bomb_is_refused_by_its_ratio(tmp_path):
    """A megabyte of zeros in a kilobyte of zip is no dataset."""
    path = make_zip(tmp_path / "z.zip", {"a.jpg": bytes(2**20)})
    refused(path, tmp_path / "root", "1,048,576 bytes are out of its limits")


@pytest.mark.parametrize("limits", [{"max_bytes": 99}, {"max_members": 1}])
def test_size_and_number_are_bounded(tmp_path, limits):
    """One byte or one member beyond the limit is too much, the limit itself is not."""
    path = make_zip(tmp_path / "z.zip", {"a.jpg": bytes(50), "b.jpg": bytes(50)})
    refused(path, tmp_path / "root", "out of its limits", **limits)
    unzip(path, tmp_path / "root", **{key: value + 1 for key, value in limits.items()})


def test_the_limits_leave_room_for_coco():
    """The largest split has 20 GB and 123,287 images, the annotations shrink about fivefold."""
    defaults = {k: v.default for k, v in inspect.signature(unzip).parameters.items()}
    assert defaults["max_bytes"] > 2 * 20e9
    assert defaults["max_members"] > 2 * 123_287
    assert defaults["max_ratio"] > 2 * 5
    assert inspect.signature(fetch).parameters["max_bytes"].default > 20e9


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_flipped_byte_is_found(tmp_path, compression):
    """The checksum of the last member fails, so none of them appears."""
    members = {"train2017/a.jpg": b"a", "train2017/b.jpg": BODY}
    path = make_zip(tmp_path / "z.zip", members, compression)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    refused(path, tmp_path / "root", "no usable zip .*: delete it, run again")


def test_what_is_no_zip_is_said(tmp_path):
    """Garbage, half a zip and an empty zip give one clear sentence each."""
    path = make_zip(tmp_path / "z.zip", {"a.jpg": BODY})
    for content in (b"", BODY, path.read_bytes()[:-50], b"PK\x05\x06" + bytes(18)):
        path.write_bytes(content)
        refused(path, tmp_path / "root", "no usable zip")


def test_a_full_disk_while_unzipping_keeps_the_zip(tmp_path, monkeypatch):
    """The half-written files go, to give their space back; the zip stays for another try."""

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = make_zip(tmp_path / "z.zip", {"a.jpg": BODY})
    with monkeypatch.context() as patch:
        patch.setattr(zipfile.shutil, "copyfileobj", full)
        refused(path, tmp_path, "No space left .* free space")
    unzip(path, tmp_path)
    assert (tmp_path / "a.jpg").read_bytes() == BODY


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=3))
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_a_damaged_zip_gives_only_our_error(flips):
    """However a zip is damaged, nothing escapes but `DownloadError`, and nothing lands outside."""
    with tempfile.TemporaryDirectory() as folder:
        outer = Path(folder)
        path = make_zip(outer / "z.zip", {"train2017/a.jpg": b"abc" * 9, "b.json": b"{}"})
        raw = bytearray(path.read_bytes())
        for position, change in flips:
            raw[position % len(raw)] ^= change
        path.write_bytes(raw)
        try:
            unzip(path, outer / "root")
        except DownloadError:
            assert names(outer / "root") == []
        assert {name.split("/")[0] for name in names(outer)} <= {"z.zip", "root"}


# The whole dataset


def image_name(split, year, index):
    return f"COCO_{split}2014_{index:012}.jpg" if year == 2014 else f"{index:012}.jpg"


def jpeg(split, year, index):
    return b"\xff\xd8" + sha256(f"{split}{year}{index}".encode()).digest() * 9 + b"\xff\xd9"


def coco(server, year):
    """Put a COCO of five images per split on the server; return {path below root: bytes}."""
    tree = {}
    for split in ("train", "val"):
        folder, images, annotations = f"{split}{year}", [], []
        for index in IDS:
            name = image_name(split, year, index)
            tree[f"{folder}/{name}"] = jpeg(split, year, index)
            url = f"http://images.cocodataset.org/{folder}/{name}"
            images.append({"id": index, "file_name": name, "coco_url": url, "license": 1})
            for copy in range(5):
                annotation = {"id": 10 * index + copy, "image_id": index, "caption": f"A {index}."}
                annotations.append(annotation)
        captions = {"info": {"year": year}, "licenses": [], "images": images}
        captions["annotations"] = annotations
        tree[f"annotations/captions_{folder}.json"] = json.dumps(captions).encode()
    for zip_name, part in (
        (f"/zips/train{year}.zip", f"train{year}/"),
        (f"/zips/val{year}.zip", f"val{year}/"),
        (f"/annotations/annotations_trainval{year}.zip", "annotations/"),
    ):
        buffer = io.BytesIO()
        make_zip(buffer, {name: body for name, body in tree.items() if name.startswith(part)})
        server.files[zip_name] = buffer.getvalue()
    server.files |= {f"/{name}": body for name, body in tree.items() if name.endswith(".jpg")}
    return tree


def files_below(root):
    return {n: (root / n).read_bytes() for n in names(root) if (root / n).is_file()}


def get(server, root, **options):
    return download_coco(root, base_url=server.url, **{**FAST, **options})


@pytest.mark.parametrize("year", [2014, 2017])
def test_whole_coco_arrives(tmp_path, server, year):
    """Exactly the files of COCO lie under the root, byte for byte; a second call asks nothing."""
    tree = coco(server, year)
    result = get(server, tmp_path, year=year)
    assert files_below(tmp_path) == tree
    for split in ("train", "val"):
        captions_file = tmp_path / f"annotations/captions_{split}{year}.json"
        assert result[split] == (tmp_path / f"{split}{year}", captions_file)
    assert len(server.asked()) == 3
    assert get(server, tmp_path, year=year) == result
    assert len(server.asked()) == 3


@pytest.mark.parametrize("year", [2014, 2017])
def test_the_first_images_make_a_valid_dataset(tmp_path, server, year):
    """The lowest ids, all their captions and nothing else; no other image is asked for."""
    tree = coco(server, year)
    result = get(server, tmp_path, year=year, first=3)
    for split, (folder, captions_file) in result.items():
        subset, kept = json.loads(captions_file.read_text()), sorted(IDS)[:3]
        assert captions_file.name == f"captions_{split}{year}.first3.json"
        assert [image["id"] for image in subset["images"]] == kept
        full = json.loads(tree[f"annotations/captions_{split}{year}.json"])
        assert subset["annotations"] == [a for a in full["annotations"] if a["image_id"] in kept]
        assert subset["info"] == full["info"]
        on_disk = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert on_disk == {image_name(split, year, i): jpeg(split, year, i) for i in kept}
    assert len(server.asked()) == 1 + 2 * 3
    assert get(server, tmp_path, year=year, first=3) == result
    assert len(server.asked()) == 1 + 2 * 3


def test_more_images_only_add(tmp_path, server):
    """A larger `first` fetches the difference, and one beyond the split means all of it."""
    coco(server, 2017)
    get(server, tmp_path, first=2, splits=["val"])
    folder, captions_file = get(server, tmp_path, first=99, splits=["val"])["val"]
    assert len(list(folder.iterdir())) == len(json.loads(captions_file.read_text())["images"]) == 5
    asked = [request["path"] for request in server.asked()]
    assert len(asked) == len(set(asked)) == 1 + 5


def test_the_first_images_grow_into_the_whole(tmp_path, server):
    """The zip completes the folder that single images began."""
    tree = coco(server, 2017)
    get(server, tmp_path, first=2)
    get(server, tmp_path)
    assert {n: b for n, b in files_below(tmp_path).items() if "first2" not in n} == tree


def test_a_lost_image_is_brought_back(tmp_path, server):
    """A split that lacks one image is not complete, so its zip, and only that, comes again."""
    tree = coco(server, 2017)
    get(server, tmp_path)
    (tmp_path / "val2017" / image_name("val", 2017, 8)).unlink()
    get(server, tmp_path)
    assert files_below(tmp_path) == tree
    assert [r["path"] for r in server.asked()[3:]] == ["/zips/val2017.zip"]


def test_images_come_from_their_own_address(tmp_path, server, monkeypatch):
    """Without a mirror each image is fetched from its `coco_url`, wherever that is."""
    monkeypatch.setattr(download, "BASE_URL", server.url)  # as if COCO's own server were this one
    (tmp_path / "annotations").mkdir()
    with serving() as elsewhere:
        elsewhere.files["/x/1.jpg"] = b"elsewhere"
        images = [{"id": 1, "file_name": "1.jpg", "coco_url": f"{elsewhere.url}/x/1.jpg"}]
        captions = json.dumps({"images": images, "annotations": []})
        (tmp_path / "annotations" / "captions_val2017.json").write_text(captions)
        get(server, tmp_path, splits=["val"], first=1)
    assert (tmp_path / "val2017" / "1.jpg").read_bytes() == b"elsewhere"


def test_a_missing_image_leaves_no_false_promise(tmp_path, server):
    """Without all of its images no cut-down captions file appears; the next call adds the rest."""
    coco(server, 2017)
    lost = f"/val2017/{image_name('val', 2017, 8)}"
    body = server.files.pop(lost)
    with pytest.raises(DownloadError, match=f"{lost} .* 404"):
        get(server, tmp_path, first=2, splits=["val"])
    assert names(tmp_path / "annotations") == ["captions_train2017.json", "captions_val2017.json"]
    server.files[lost] = body
    folder, captions_file = get(server, tmp_path, first=2, splits=["val"])["val"]
    assert captions_file.exists() and len(list(folder.iterdir())) == 2
    assert len(server.asked(f"/val2017/{image_name('val', 2017, 4)}")) == 1


@pytest.mark.parametrize("reason", [DownloadError, KeyboardInterrupt])
def test_a_failure_or_control_c_begins_no_further_image(tmp_path, monkeypatch, reason):
    """Of two thousand images only those that were under way are still finished."""
    begun = []

    def fail_first(url, path, **options):
        begun.append(path)
        if len(begun) == 1:
            raise reason("stop")
        threading.Event().wait(0.02)

    monkeypatch.setattr(download, "fetch", fail_first)
    captions = {"images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(2000)]}
    (tmp_path / "annotations").mkdir()
    captions_file = tmp_path / "annotations" / "captions_val2017.json"
    captions_file.write_text(json.dumps({**captions, "annotations": []}))
    with pytest.raises(reason):
        download_coco(tmp_path, splits=["val"], first=2000)
    assert len(begun) < 200
    assert names(captions_file.parent) == ["captions_val2017.json"]


def test_an_incomplete_zip_is_not_called_complete(tmp_path, server):
    """A zip without all images of the captions file is an error, not a smaller dataset."""
    coco(server, 2017)
    buffer = io.BytesIO()
    make_zip(buffer, {"val2017/000000000004.jpg": b"only one"})
    server.files["/zips/val2017.zip"] = buffer.getvalue()
    with pytest.raises(DownloadError, match="lacks images of .*captions_val2017.json"):
        get(server, tmp_path, splits=["val"])


@pytest.mark.parametrize(
    "wrong",
    [{"year": 2015}, {"splits": ["test"]}, {"splits": "train"}, {"first": 0}, {"first": -1}],
)
def test_what_coco_does_not_have_is_a_value_error(tmp_path, wrong):
    """Before any request, and the message names what exists."""
    with pytest.raises(ValueError, match=r"\(2014, 2017\), \('train', 'val'\)"):
        download_coco(tmp_path, **wrong)


HOSTILE = [
    {"images": [{"id": 1, "file_name": "../../escaped.jpg"}], "annotations": []},
    {"images": [{"id": 1, "file_name": "/escaped.jpg"}], "annotations": []},
    {"images": [{"id": 1, "file_name": "a\\b.jpg"}], "annotations": []},
    {"images": [{"id": 1, "file_name": 7}], "annotations": []},
    {"images": [{"id": 1}, {"id": "2"}], "annotations": []},
    {"images": []},
    {"images": [], "annotations": [{}]},
    {"images": {"id": 1}, "annotations": []},
    [],
    None,
]


@pytest.mark.parametrize("content", [*map(json.dumps, HOSTILE), "not json", ""])
def test_a_hostile_captions_file_writes_nothing(tmp_path, content):
    """Names that leave the image folder, and files of any other shape, stop everything."""
    (tmp_path / "root" / "annotations").mkdir(parents=True)
    captions_file = tmp_path / "root" / "annotations" / "captions_val2017.json"
    captions_file.write_text(content)
    before = names(tmp_path)
    with pytest.raises(DownloadError, match="captions_val2017.json .* delete it"):
        download_coco(tmp_path / "root", splits=["val"], first=1, base_url="http://127.0.0.1:1")
    assert names(tmp_path) == before


# The command


def command(server, root, *arguments):
    script = Path(download.__file__)
    return [sys.executable, script, "--root", root, "--base-url", server.url, *arguments]


def test_the_command_brings_the_dataset(tmp_path, server):
    """It succeeds and prints where each split lies."""
    coco(server, 2017)
    done = subprocess.run(
        command(server, tmp_path, "--first", "2"), capture_output=True, text=True, timeout=10
    )
    assert done.returncode == 0, done.stderr
    paths = [tmp_path / "val2017", tmp_path / "annotations" / "captions_val2017.first2.json"]
    assert done.stdout.splitlines()[1] == f"val: {paths[0]} {paths[1]}"
    assert all(path.exists() for path in paths)


@pytest.mark.parametrize("arguments", [["--year", "2014"], ["--first", "0"]])
def test_the_command_fails_with_one_line(tmp_path, server, arguments):
    """An error is a line on stderr and exit code 1, not a traceback."""
    done = subprocess.run(
        command(server, tmp_path, *arguments), capture_output=True, text=True, timeout=10
    )
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"error: .*\n", done.stderr)


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_control_c_keeps_the_part_and_says_so(tmp_path, server):
    """What had arrived waits for the same command, which completes it."""
    coco(server, 2017)
    path = "/annotations/annotations_trainval2017.zip"
    server.files[path] = bytes(2**17) + server.files[path]  # still a zip, but more than one read
    server.faults[path] = [stall]
    process = subprocess.Popen(
        command(server, tmp_path, "--first", "1"), stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert server.stalled.wait(10)
    part = tmp_path / "annotations_trainval2017.zip.part"
    while process.poll() is None and not (part.exists() and part.stat().st_size):
        threading.Event().wait(0.01)
    process.send_signal(signal.SIGINT)
    assert "the same command resumes" in process.communicate(timeout=10)[1]
    assert process.returncode != 0 and part.exists()
    assert get(server, tmp_path, first=1).keys() == {"train", "val"}
    assert server.asked(path)[1]["Range"] == f"bytes={2**16}-"
