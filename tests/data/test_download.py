"""The COCO downloader against an unreliable server (coco_server.py).

Every oracle is what the server holds: its bytes are compared with the files on the disk.
"""

import errno
import inspect
import io
import json
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest
from coco_server import (
    FAULTS,
    IDS,
    image_name,
    jpeg,
    make_zip,
    redirect,
    serve_coco,
    serving,
    truncate,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from captioning.base import files
from captioning.data import download
from captioning.data.download import DownloadError, download_coco, fetch, unzip

FAST = {"tries": 4, "timeout": 0.3, "backoff": 0.001}
BODY = b"".join(sha256(bytes([i % 256, i // 256])).digest() for i in range(6250))  # 200 kB
OTHER_BODY = BODY[::-1]


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


# ---------------------------------------------------------------------------- fetch: success


def test_fetch_writes_one_complete_file(tmp_path, server):
    """The bytes are the server's, missing folders are created, and no other file remains."""
    path = fetch(f"{server.url}/file", tmp_path / "new" / "folder" / "file", **FAST)
    assert path.read_bytes() == BODY
    assert names(path.parent) == ["file"]


def test_a_complete_file_is_not_requested(tmp_path, server):
    """A file under its final name is complete: there is no request."""
    (tmp_path / "file").write_bytes(b"from before")
    assert fetch_file(server, tmp_path).read_bytes() == b"from before"
    assert server.received() == []


@pytest.mark.parametrize("at", [0, 1, 2**16, len(BODY) - 1])
def test_a_truncated_answer_is_resumed(tmp_path, server, at):
    """The next attempt requests only the missing bytes, of the same version."""
    server.faults["/file"] = [lambda handler, body: truncate(handler, body, at)]
    assert fetch_file(server, tmp_path).read_bytes() == BODY
    expected = (f"bytes={at}-", server.validators(BODY)["ETag"]) if at else (None, None)
    assert (server.received()[1]["Range"], server.received()[1]["If-Range"]) == expected


@pytest.mark.parametrize("fault", ["stall", "reset", "hang up", "fail"])
def test_temporary_failures_are_retried(tmp_path, server, fault):
    """A second attempt follows a lost connection and a server error; after a stall, it resumes."""
    server.faults["/file"] = [fault]
    assert fetch_file(server, tmp_path).read_bytes() == BODY
    assert len(server.received()) == 2
    assert fault != "stall" or int(server.received()[1]["Range"][6:-1]) >= 2**16


def test_a_later_call_resumes(tmp_path, server):
    """After the last attempt the partial file is kept, named in the error, and resumed later."""
    server.faults["/file"] = ["truncate"]
    with pytest.raises(DownloadError, match="file.part will be resumed"):
        fetch_file(server, tmp_path, tries=1)
    assert names(tmp_path) == ["file.part", "file.part.tag"]
    assert fetch_file(server, tmp_path).read_bytes() == BODY
    assert server.received()[1]["Range"] == f"bytes={len(BODY) // 2}-"


@pytest.mark.parametrize("faults", [["truncate", "ignore range"], ["send too much"]])
def test_other_lengths_than_requested(tmp_path, server, faults):
    """A whole file in answer to a range replaces the part; bytes after its end are dropped."""
    server.faults["/file"] = faults
    assert fetch_file(server, tmp_path).read_bytes() == BODY


@pytest.mark.parametrize("second", ["wrong range", "short range"])
def test_only_the_requested_range_is_appended(tmp_path, server, second):
    """After an answer with another range, the download starts again."""
    server.faults["/file"] = ["truncate", second]
    assert fetch_file(server, tmp_path).read_bytes() == BODY
    assert [request["Range"] for request in server.received()] == [None, "bytes=100000-", None]


@pytest.mark.parametrize("second", ["serve correctly", "ignore if-range", "wrong range"])
def test_two_versions_are_never_mixed(tmp_path, server, second):
    """If the file changes between attempts, the result is its new version."""

    def truncate_and_change(handler, body):
        handler.server.files["/file"] = OTHER_BODY + b"longer"
        truncate(handler, body)

    server.faults["/file"] = [truncate_and_change, second]
    assert fetch_file(server, tmp_path).read_bytes() == OTHER_BODY + b"longer"


DATE = "Wed, 21 Oct 2015 07:28:00 GMT"


@pytest.mark.parametrize(
    "tags, if_range", [({"Last-Modified": DATE}, DATE), ({"ETag": 'W/"weak"'}, None), ({}, None)]
)
def test_only_reliable_validators_allow_resuming(tmp_path, server, tags, if_range):
    """Last-Modified replaces a missing ETag; with a weak ETag or none the download starts again."""
    server.validators = lambda body: tags
    server.faults["/file"] = ["truncate"]
    assert fetch_file(server, tmp_path).read_bytes() == BODY
    assert server.received()[1]["If-Range"] == if_range
    assert bool(server.received()[1]["Range"]) == bool(if_range)


@pytest.mark.parametrize(
    "part, tagged, requests", [(b"other bytes", False, 1), (BODY + b"too long", True, 2)]
)
def test_an_unusable_part_is_discarded(tmp_path, server, part, tagged, requests):
    """A part without a tag is overwritten, and so is one longer than the file (status 416)."""
    (tmp_path / "file.part").write_bytes(part)
    if tagged:
        (tmp_path / "file.part.tag").write_text(server.validators(BODY)["ETag"])
    assert fetch_file(server, tmp_path).read_bytes() == BODY
    assert len(server.received()) == requests


@given(st.lists(st.sampled_from([name for name in FAULTS if name != "stall"])), st.integers(0, 4))
@settings(max_examples=20, deadline=None, derandomize=True, database=None)
def test_a_file_is_correct_or_absent(faults, change_at):
    """Whatever the server does and whenever its file changes, the final file is never wrong."""
    with tempfile.TemporaryDirectory() as folder, serving() as server:

        def with_change(fault, index):
            def act(handler, body):
                if index == change_at:
                    body = handler.server.files["/file"] = OTHER_BODY
                FAULTS[fault](handler, body)

            return act

        server.files["/file"] = BODY
        server.faults["/file"] = [with_change(fault, i) for i, fault in enumerate(faults)]
        try:
            content = fetch_file(server, Path(folder), tries=6, quiet=True).read_bytes()
        except DownloadError:
            assert not (Path(folder) / "file").exists()
        else:
            assert content == server.files["/file"]


def test_a_redirect_within_the_web_is_followed(tmp_path, server):
    """Mirrors may redirect to another http address."""
    server.faults["/old"] = [redirect("/file")]
    assert fetch(f"{server.url}/old", tmp_path / "file", **FAST).read_bytes() == BODY


# ------------------------------------- fetch: errors, which name address, file and remedy


def test_a_missing_file_is_an_error_at_once(tmp_path, server):
    """Status 404 is permanent: there is one request."""
    with pytest.raises(DownloadError, match="/absent for file .* 404 .*: check the year"):
        fetch(f"{server.url}/absent", tmp_path / "file", **FAST)
    assert len(server.received()) == 1 and names(tmp_path) == []


def test_number_and_spacing_of_attempts(tmp_path, server, monkeypatch):
    """A server that keeps failing receives `tries` requests with growing pauses."""
    pauses = []
    monkeypatch.setattr(download.time, "sleep", pauses.append)
    server.faults["/file"] = ["fail"] * 9
    with pytest.raises(DownloadError, match="in 4 attempts .*500.*: check the network"):
        fetch_file(server, tmp_path, backoff=1)
    assert len(server.received()) == 4
    assert pauses == [0, 1, 3, 7]


def test_a_refused_connection(tmp_path):
    """The message names the address and the network."""
    with socket.socket() as unused:  # bound but not listening: connections are refused
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/file"
        with pytest.raises(DownloadError, match=f"{url} .*refused.*: check the network"):
            fetch(url, tmp_path / "file", **FAST)


@pytest.mark.parametrize(
    "url", ["file:///etc/hostname", "ftp://127.0.0.1/x", "data:,x", "", "None"]
)
def test_only_web_addresses_are_opened(tmp_path, url):
    """Every scheme but http and https is an error."""
    with pytest.raises(DownloadError, match="only http and https"):
        fetch(url, tmp_path / "file", **FAST)
    assert names(tmp_path) == []


@pytest.mark.parametrize("target", ["file:///etc/hostname", "data:,x", "ftp"])
def test_a_redirect_to_another_scheme_is_refused(tmp_path, server, target):
    """A server cannot redirect to local files, and an ftp server receives no connection."""
    with socket.create_server(("127.0.0.1", 0)) as ftp:
        if target == "ftp":
            target = f"ftp://127.0.0.1:{ftp.getsockname()[1]}/file"
        server.faults["/file"] = [redirect(target)] * 9
        with pytest.raises(DownloadError):
            fetch_file(server, tmp_path)
        ftp.setblocking(False)
        with pytest.raises(BlockingIOError):
            ftp.accept()
    assert names(tmp_path) == []


def test_fewer_bytes_than_announced_are_never_a_file(tmp_path, server):
    """If every answer is shorter than announced, there is an error and no file."""
    server.faults["/file"] = ["announce too much"] * 9
    with pytest.raises(DownloadError, match="4 attempts .*(200,000 of 200,010 bytes|416)"):
        fetch_file(server, tmp_path)
    assert not (tmp_path / "file").exists()


def test_the_size_is_limited(tmp_path, server):
    """More than `max_bytes` is an error before anything is written; exactly as much is not."""
    with pytest.raises(DownloadError, match="has 200,000 bytes .* for file, limit 199,999"):
        fetch_file(server, tmp_path, max_bytes=len(BODY) - 1)
    assert names(tmp_path) == []
    assert fetch_file(server, tmp_path, max_bytes=len(BODY)).read_bytes() == BODY


@pytest.mark.parametrize("fault", ["no length", "web page"])
def test_answers_that_cannot_be_the_file(tmp_path, server, fault):
    """A sign-in page is an error, and so is a file whose completeness cannot be checked."""
    server.faults["/file"] = [fault]
    with pytest.raises(DownloadError, match="file, .*sign in"):
        fetch_file(server, tmp_path)
    assert names(tmp_path) == []


class FullDisk(io.FileIO):
    """A file on a disk with `space` bytes left."""

    space = 70_000

    def write(self, data):
        if self.tell() + len(data) > self.space:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


def test_a_full_disk_keeps_the_part(tmp_path, server, monkeypatch):
    """A full disk is not retried; the part is resumed by the next call."""
    with monkeypatch.context() as patch:
        patch.setattr(download, "open", FullDisk, raising=False)
        with pytest.raises(DownloadError, match="No space left .* is kept: free disk space"):
            fetch_file(server, tmp_path)
    assert len(server.received()) == 1
    assert (tmp_path / "file.part").read_bytes() == BODY[: 2**16]
    assert fetch_file(server, tmp_path).read_bytes() == BODY
    assert server.received()[1]["Range"] == "bytes=65536-"


# ---------------------------------------------------------------------------- unzip


def change_byte(path, position, change=1):
    raw = bytearray(path.read_bytes())
    raw[position % len(raw)] ^= change
    path.write_bytes(raw)


def assert_refused(zip_path, folder, match, **limits):
    """`unzip` fails with one line, keeps the zip and leaves no file anywhere."""
    folder.mkdir(exist_ok=True)
    before = names(folder.parent)
    with pytest.raises(DownloadError, match=match) as caught:
        unzip(zip_path, folder, **limits)
    assert str(zip_path) in str(caught.value) and "\n" not in str(caught.value)
    assert names(folder.parent) == before


def test_unzip(tmp_path):
    """All members are extracted; the zip and the hidden folder are deleted."""
    members = {"train2017/a.jpg": b"a" * 99, "train2017/b.jpg": b"", "annotations/c.json": b"{}"}
    unzip(make_zip(tmp_path / "some.zip", members), tmp_path / "root")
    assert files_below(tmp_path / "root") == members
    assert names(tmp_path)[0] == "root"


def test_unzip_into_an_existing_folder(tmp_path):
    """Other files are kept, files of the same name are replaced, remains of a kill are deleted."""
    scratch = tmp_path / ".z.zip.unzipping" / "train2017"
    for folder in (scratch, tmp_path / "train2017"):
        folder.mkdir(parents=True)
    (scratch / "old.jpg").write_bytes(b"half")
    (tmp_path / "train2017" / "mine.txt").write_text("keep me")
    (tmp_path / "train2017" / "a.jpg").write_bytes(b"half wri")
    unzip(
        make_zip(tmp_path / "z.zip", {"train2017/a.jpg": b"a", "train2017/b.jpg": b"b"}), tmp_path
    )
    expected = {"mine.txt": b"keep me", "a.jpg": b"a", "b.jpg": b"b"}
    assert files_below(tmp_path) == {f"train2017/{name}": b for name, b in expected.items()}
    assert not scratch.exists()


OUTSIDE = ["../x", "/x", "a/../../x", "C:/x", "C:x", "a\\..\\..\\x", "./x", "a//x", "..", "a\nb"]


@pytest.mark.parametrize("name", [*OUTSIDE, "a/" * 500 + "x"])
def test_a_member_must_not_leave_the_folder(tmp_path, name):
    """A name that could point elsewhere on any system makes the whole zip invalid."""
    members = {"train2017/a.jpg": b"a", name: b"escaped"}
    assert_refused(make_zip(tmp_path / "z.zip", members), tmp_path / "root", "member")


def with_link(path):
    link = zipfile.ZipInfo("train2017")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    make_zip(path, {link: "/etc", "train2017/a.jpg": b"a"})


def encrypted(path):
    make_zip(path, {"a.jpg": b"a"})
    change_byte(path, path.read_bytes().index(b"PK\x01\x02") + 8)


def flipped_bit(path, compression=zipfile.ZIP_DEFLATED):
    make_zip(path, {"train2017/a.jpg": b"a", "train2017/b.jpg": BODY}, compression)
    change_byte(path, path.stat().st_size // 2)


def truncated(path):
    path.write_bytes(make_zip(path, {"a.jpg": BODY}).read_bytes()[:-50])


@pytest.mark.parametrize(
    "make, reason",
    [
        (with_link, "'train2017' is a link"),
        (encrypted, "encrypted"),
        (lambda path: make_zip(path, {"a.jpg": bytes(2**20)}), "1,048,576 bytes exceed the limits"),
        (flipped_bit, "delete it, run again"),
        (lambda path: flipped_bit(path, zipfile.ZIP_STORED), "delete it, run again"),
        (truncated, "not a valid zip"),
        (lambda path: path.write_bytes(b""), "not a valid zip"),
        (lambda path: path.write_bytes(BODY), "not a valid zip"),
        (lambda path: path.write_bytes(b"PK\x05\x06" + bytes(18)), "not a valid zip"),
    ],
    ids=[
        "link",
        "encrypted",
        "bomb",
        "flipped",
        "flipped, stored",
        "truncated",
        "empty file",
        "random bytes",
        "no members",
    ],
)
def test_an_invalid_zip_is_refused(tmp_path, make, reason):
    """Nothing of a zip is extracted if a member is unsafe or damaged or the ratio too high."""
    make(tmp_path / "z.zip")
    assert_refused(tmp_path / "z.zip", tmp_path / "root", reason)


@pytest.mark.parametrize("limits", [{"max_bytes": 99}, {"max_members": 1}])
def test_size_and_number_of_members_are_limited(tmp_path, limits):
    """One byte or one member above the limit is refused, the limit itself is not."""
    path = make_zip(tmp_path / "z.zip", {"a.jpg": bytes(50), "b.jpg": bytes(50)})
    assert_refused(path, tmp_path / "root", "exceed the limits", **limits)
    unzip(path, tmp_path / "root", **{key: value + 1 for key, value in limits.items()})


def test_the_default_limits_allow_coco():
    """The largest split has 20 GB and 123,287 images; the captions shrink about fivefold."""
    defaults = {k: v.default for k, v in inspect.signature(unzip).parameters.items()}
    assert defaults["max_bytes"] > 2 * 20e9
    assert defaults["max_members"] > 2 * 123_287
    assert defaults["max_ratio"] > 2 * 5
    assert inspect.signature(fetch).parameters["max_bytes"].default > 20e9


def test_a_full_disk_while_unzipping_keeps_the_zip(tmp_path, monkeypatch):
    """Partly extracted files are deleted; the zip is extracted by the next call."""

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = make_zip(tmp_path / "z.zip", {"a.jpg": BODY})
    with monkeypatch.context() as patch:
        patch.setattr(zipfile.shutil, "copyfileobj", full)
        assert_refused(path, tmp_path, "No space left .* free disk space")
    unzip(path, tmp_path)
    assert (tmp_path / "a.jpg").read_bytes() == BODY


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=3))
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_damaged_zips_raise_only_download_errors(changes):
    """Whichever bytes are changed, no other exception is raised and no file leaves the folder."""
    with tempfile.TemporaryDirectory() as folder:
        outer = Path(folder)
        path = make_zip(outer / "z.zip", {"train2017/a.jpg": b"abc" * 9, "b.json": b"{}"})
        for position, change in changes:
            change_byte(path, position, change)
        try:
            unzip(path, outer / "root")
        except DownloadError:
            assert names(outer / "root") == []
        assert {name.split("/")[0] for name in names(outer)} <= {"z.zip", "root"}


# ---------------------------------------------------------------------------- download_coco


def files_below(root):
    return {n: (root / n).read_bytes() for n in names(root) if (root / n).is_file()}


def get(server, root, **options):
    return download_coco(root, base_url=server.url, **{**FAST, **options})


def write_val_captions(root, content):
    (root / "annotations").mkdir(parents=True)
    (root / "annotations" / "captions_val2017.json").write_text(content)


@pytest.mark.parametrize("year", [2014, 2017])
def test_all_of_coco(tmp_path, server, year):
    """All files of COCO, and no others, are below the root; a second call makes no request."""
    tree = serve_coco(server, year)
    result = get(server, tmp_path, year=year)
    assert files_below(tmp_path) == tree
    for split in ("train", "val"):
        captions_file = tmp_path / f"annotations/captions_{split}{year}.json"
        assert result[split] == (tmp_path / f"{split}{year}", captions_file)
    assert get(server, tmp_path, year=year) == result
    assert len(server.received()) == 3


@pytest.mark.parametrize("year", [2014, 2017])
def test_the_first_images(tmp_path, server, year):
    """The images with the lowest ids and all their captions; no other image is requested."""
    tree = serve_coco(server, year)
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
    assert get(server, tmp_path, year=year, first=3) == result
    assert len(server.received()) == 1 + 2 * 3


def test_more_images_are_added(tmp_path, server):
    """A larger `first` requests only the difference; one beyond the split means all of it."""
    serve_coco(server)
    get(server, tmp_path, first=2, splits=["val"])
    folder, captions_file = get(server, tmp_path, first=99, splits=["val"])["val"]
    assert len(list(folder.iterdir())) == len(json.loads(captions_file.read_text())["images"]) == 5
    requested = [request["path"] for request in server.received()]
    assert len(requested) == len(set(requested)) == 1 + 5


def test_the_zip_completes_single_images(tmp_path, server):
    """After `first`, a call without it leads to all of COCO."""
    tree = serve_coco(server)
    get(server, tmp_path, first=2)
    get(server, tmp_path)
    assert {n: b for n, b in files_below(tmp_path).items() if "first2" not in n} == tree


def test_a_deleted_image_is_restored(tmp_path, server):
    """If a split lacks an image, its zip, and nothing else, is downloaded again."""
    tree = serve_coco(server)
    get(server, tmp_path)
    (tmp_path / "val2017" / image_name("val", 2017, 8)).unlink()
    get(server, tmp_path)
    assert files_below(tmp_path) == tree
    assert [r["path"] for r in server.received()[3:]] == ["/zips/val2017.zip"]


def test_images_come_from_their_coco_url(tmp_path, server, monkeypatch):
    """Without a mirror each image is downloaded from its `coco_url`, on any server."""
    monkeypatch.setattr(download, "BASE_URL", server.url)  # so that it is not a mirror
    with serving() as elsewhere:
        elsewhere.files["/x/1.jpg"] = b"elsewhere"
        images = [{"id": 1, "file_name": "1.jpg", "coco_url": f"{elsewhere.url}/x/1.jpg"}]
        write_val_captions(tmp_path, json.dumps({"images": images, "annotations": []}))
        get(server, tmp_path, splits=["val"], first=1)
    assert (tmp_path / "val2017" / "1.jpg").read_bytes() == b"elsewhere"


def test_the_captions_file_is_written_last(tmp_path, server):
    """It appears only with all of its images; the next call requests the missing ones alone."""
    serve_coco(server)
    lost = f"/val2017/{image_name('val', 2017, 8)}"
    body = server.files.pop(lost)
    with pytest.raises(DownloadError, match=f"{lost} .* 404"):
        get(server, tmp_path, first=2, splits=["val"])
    assert names(tmp_path / "annotations") == ["captions_train2017.json", "captions_val2017.json"]
    server.files[lost] = body
    folder, captions_file = get(server, tmp_path, first=2, splits=["val"])["val"]
    assert captions_file.exists() and len(list(folder.iterdir())) == 2
    assert len(server.received(f"/val2017/{image_name('val', 2017, 4)}")) == 1


def test_a_full_disk_leaves_no_partial_captions_file(tmp_path, server, monkeypatch):
    """The error is one sentence, and the next call writes the file."""
    serve_coco(server)
    with monkeypatch.context() as patch:
        patch.setattr(files, "open", FullDisk, raising=False)
        patch.setattr(FullDisk, "space", 10)
        with pytest.raises(
            DownloadError, match="^cannot write .*first2.json .*No space left[^.]*$"
        ):
            get(server, tmp_path, first=2, splits=["val"])
    assert names(tmp_path / "annotations") == ["captions_train2017.json", "captions_val2017.json"]
    assert get(server, tmp_path, first=2, splits=["val"])["val"][1].exists()


@pytest.mark.parametrize("reason", [DownloadError, KeyboardInterrupt])
def test_no_image_is_started_after_an_error(tmp_path, monkeypatch, reason):
    """After an error or Ctrl-C only the downloads in progress are finished."""
    started = []

    def fail_first(url, path, **options):
        started.append(path)
        if len(started) == 1:
            raise reason("stop")
        threading.Event().wait(0.02)

    monkeypatch.setattr(download, "fetch", fail_first)
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(2000)]
    write_val_captions(tmp_path, json.dumps({"images": images, "annotations": []}))
    with pytest.raises(reason):
        download_coco(tmp_path, splits=["val"], first=2000)
    assert len(started) < 200
    assert names(tmp_path / "annotations") == ["captions_val2017.json"]


def test_an_incomplete_zip_is_an_error(tmp_path, server):
    """A zip must contain all images of the captions file."""
    serve_coco(server)
    zip_file = make_zip(io.BytesIO(), {"val2017/000000000004.jpg": b"only one"})
    server.files["/zips/val2017.zip"] = zip_file.getvalue()
    with pytest.raises(DownloadError, match="lacks images of .*captions_val2017.json"):
        get(server, tmp_path, splits=["val"])


@pytest.mark.parametrize(
    "wrong",
    [{"year": 2015}, {"splits": ["test"]}, {"splits": "train"}, {"first": 0}, {"first": -1}],
)
def test_arguments_that_coco_does_not_have(tmp_path, wrong):
    """They are a ValueError that names the alternatives."""
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
def test_an_invalid_captions_file_writes_nothing(tmp_path, content):
    """File names outside the image folder, and any other structure, are an error."""
    write_val_captions(tmp_path / "root", content)
    before = names(tmp_path)
    with pytest.raises(DownloadError, match="captions_val2017.json .* delete it"):
        download_coco(tmp_path / "root", splits=["val"], first=1, base_url="http://127.0.0.1:1")
    assert names(tmp_path) == before


# ---------------------------------------------------------------------------- the command


def command(server, root, *arguments):
    script = Path(download.__file__)
    return [sys.executable, script, "--root", root, "--base-url", server.url, *arguments]


def run(*arguments):
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=10)


def test_the_command(tmp_path, server):
    """It prints the paths of each split."""
    serve_coco(server)
    done = run(server, tmp_path, "--first", "2")
    assert done.returncode == 0, done.stderr
    paths = [tmp_path / "val2017", tmp_path / "annotations" / "captions_val2017.first2.json"]
    assert done.stdout.splitlines()[1] == f"val: {paths[0]} {paths[1]}"
    assert all(path.exists() for path in paths)


@pytest.mark.parametrize("arguments", [["--year", "2014"], ["--first", "0"]])
def test_the_command_fails_with_one_line(tmp_path, server, arguments):
    """An error is one line on stderr and exit code 1, without a traceback."""
    done = run(server, tmp_path, *arguments)
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"error: .*\n", done.stderr)


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_keeps_the_part(tmp_path, server):
    """After Ctrl-C the same command resumes."""
    serve_coco(server)
    path = "/annotations/annotations_trainval2017.zip"
    server.files[path] = bytes(2**17) + server.files[path]  # still a zip, but several chunks
    server.faults[path] = ["stall"]
    process = subprocess.Popen(
        command(server, tmp_path, "--first", "1"),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert server.stalled.wait(10)
    part = tmp_path / "annotations_trainval2017.zip.part"
    while process.poll() is None and not (part.exists() and part.stat().st_size):
        threading.Event().wait(0.01)
    process.send_signal(signal.SIGINT)
    assert "run the same command again to resume" in process.communicate(timeout=10)[1]
    assert process.returncode != 0 and part.exists()
    assert get(server, tmp_path, first=1).keys() == {"train", "val"}
    assert server.received(path)[1]["Range"] == f"bytes={2**16}-"
