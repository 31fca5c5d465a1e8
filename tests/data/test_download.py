"""The COCO downloader against an unreliable server (coco_server.py).

Every oracle is what the server holds: its bytes are compared with the files on the disk.
"""

import contextlib
import errno
import io
import json
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import zipfile
from functools import partial
from hashlib import sha256
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from coco_server import FAULTS, IDS, Server, image_name, make_zip, redirect, serve_coco, truncate

from captioning.base import files
from captioning.data import download
from captioning.data.download import DownloadError, download_coco, fetch, unzip

ROOT = Path(__file__).parents[2]
BODY = b"".join(sha256(bytes([i % 256, i // 256])).digest() for i in range(6250))  # 200 kB
OTHER_BODY = BODY[::-1] + b"longer"


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Four attempts in quick succession, without a proxy."""
    monkeypatch.setenv("no_proxy", "*")
    for name, value in {"TRIES": 4, "TIMEOUT": 0.3, "BACKOFF": 0.001}.items():
        monkeypatch.setattr(download, name, value)


@pytest.fixture
def server():
    with Server() as server:
        server.files["/file"] = BODY
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield server
        server.release.set()
        server.shutdown()
        thread.join()


def fetch_file(server, folder):
    return fetch(f"{server.url}/file", folder).read_bytes()


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


def files_below(root):
    return {n: (root / n).read_bytes() for n in names(root) if (root / n).is_file()}


# ---------------------------------------------------------------------------- fetch


def test_fetch_writes_one_complete_file(tmp_path, server):
    """Redirects are followed, missing folders created; a second call makes no request."""
    server.faults["/old/file"] = [redirect("/file")]
    for _ in range(2):
        assert fetch(f"{server.url}/old/file", tmp_path / "new" / "folder").read_bytes() == BODY
    assert names(tmp_path) == ["new", "new/folder", "new/folder/file"]
    assert server.received() == ["/old/file", "/file"]


@pytest.mark.parametrize("first", sorted(FAULTS.keys() - {"stall"}))
@pytest.mark.parametrize("changes", [False, True], ids=["same file", "file changes"])
def test_a_file_is_correct_or_absent(tmp_path, server, first, changes):
    """After any two faults, the file is that of the server, also if it changed in between."""
    for number, second in enumerate(FAULTS.keys() - {"stall"}):

        def change(handler, body, second=second):
            if changes:
                body = server.files[handler.path] = OTHER_BODY
            FAULTS[second](handler, body)

        path = f"/{number}"
        server.files[path], server.faults[path] = BODY, [first, change]
        try:
            assert fetch(server.url + path, tmp_path).read_bytes() == server.files[path], second
        except DownloadError:
            assert {first, second} & {"no length", "web page"}, second
            assert not (tmp_path / path[1:]).exists()


TAG, DATE = '"some version"', "Wed, 21 Oct 2015 07:28:00 GMT"


@pytest.mark.parametrize(
    "at, tags, if_range",
    [
        (2**14, {"ETag": TAG, "Last-Modified": DATE}, TAG),
        (len(BODY) - 1, {"ETag": TAG}, TAG),
        ("stall", {"ETag": TAG}, TAG),
        (100_000, {"Last-Modified": DATE}, DATE),
        (100_000, {"ETag": 'W/"weak"'}, None),
        (100_000, {}, None),
        (0, {"ETag": TAG}, None),
    ],
)
def test_a_lost_connection_is_resumed(tmp_path, server, at, tags, if_range):
    """The rest is requested from the last complete chunk on, if the file has an ETag or date."""
    server.validators = lambda body: tags
    server.faults["/file"] = [at if at == "stall" else partial(truncate, at=at)]
    assert fetch_file(server, tmp_path) == BODY
    start = (100_000 if at == "stall" else at) // 2**14 * 2**14
    assert server.received("If-Range") == [None, if_range]
    assert server.received("Range") == [None, f"bytes={start}-" if if_range else None]


@pytest.mark.parametrize("part, requests", [(b"untagged", 1), (BODY + b"too long", 2)])
def test_an_unusable_part_is_discarded(tmp_path, server, part, requests):
    """A part without a tag is overwritten, and so is one longer than the file (status 416)."""
    (tmp_path / "file.part").write_bytes(part)
    if requests == 2:
        (tmp_path / "file.part.tag").write_text(server.validators(BODY)["ETag"])
    assert fetch_file(server, tmp_path) == BODY
    assert len(server.received()) == requests


@pytest.mark.parametrize("target", ["file:///etc/hostname", "data:,x", "ftp"])
@pytest.mark.parametrize("redirected", [False, True])
def test_only_web_addresses_are_opened(tmp_path, server, target, redirected):
    """Local files and other protocols are refused at once; an ftp server receives no connection."""
    with socket.create_server(("127.0.0.1", 0)) as ftp:
        url = f"ftp://127.0.0.1:{ftp.getsockname()[1]}/file" if target == "ftp" else target
        server.faults["/file"] = [redirect(url)]
        with pytest.raises(DownloadError, match="is refused .*: check the base url"):
            fetch(f"{server.url}/file" if redirected else url, tmp_path)
        ftp.setblocking(False)
        with pytest.raises(BlockingIOError):
            ftp.accept()
    assert names(tmp_path) == []


def test_number_and_spacing_of_attempts(tmp_path, server, monkeypatch):
    """A server that keeps failing receives TRIES requests with growing pauses; then it resumes."""
    pauses = []
    monkeypatch.setattr(download.time, "sleep", pauses.append)
    monkeypatch.setattr(download, "BACKOFF", 1)
    server.faults["/file"] = ["truncate", "fail", "fail", "fail"]
    with pytest.raises(DownloadError, match="/file .* in 4 attempts .*500.*: check .*part will be"):
        fetch_file(server, tmp_path)
    assert pauses == [0, 1, 3, 7]
    assert names(tmp_path) == ["file.part", "file.part.tag"]
    assert fetch_file(server, tmp_path) == BODY
    assert server.received("Range")[4] == "bytes=98304-"


@pytest.mark.parametrize(
    "fault, message",
    [
        (lambda handler, body: handler.answer(404), "failed with 404: check the year"),
        ("no length", "has 0 bytes .*sign in"),
        ("web page", "has .*'text/html'.*sign in"),
        ("serve correctly", "has 200,000 bytes .* limit is 199,999"),
    ],
    ids=["404", "no length", "web page", "too large"],
)
def test_permanent_errors(tmp_path, server, monkeypatch, fault, message):
    """They end the download after one request, before anything is written."""
    monkeypatch.setattr(download, "MAX_BYTES", len(BODY) - (fault == "serve correctly"))
    server.faults["/file"] = [fault]
    with pytest.raises(DownloadError, match=f"{server.url}/file {message}"):
        fetch_file(server, tmp_path)
    assert len(server.received()) == 1 and names(tmp_path) == []


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
        with pytest.raises(OSError, match="No space left"):
            fetch_file(server, tmp_path)
    assert (tmp_path / "file.part").read_bytes() == BODY[: 2**16]
    assert fetch_file(server, tmp_path) == BODY
    assert server.received("Range") == [None, "bytes=65536-"]


# ---------------------------------------------------------------------------- unzip


def write_zip(folder, members, compression=zipfile.ZIP_DEFLATED):
    (folder / "z.zip").write_bytes(make_zip(members, compression))
    return folder / "z.zip"


def change_byte(path, position, change=1):
    raw = bytearray(path.read_bytes())
    raw[position % len(raw)] ^= change
    path.write_bytes(raw)


def test_unzip_into_an_existing_folder(tmp_path):
    """Other files are kept, files of the same name are replaced, remains of a kill are deleted."""
    scratch = tmp_path / ".z.zip.unzipping" / "train2017"
    for folder in (scratch, tmp_path / "train2017"):
        folder.mkdir(parents=True)
    (scratch / "old.jpg").write_bytes(b"half")
    (tmp_path / "train2017" / "mine.txt").write_text("keep me")
    (tmp_path / "train2017" / "a.jpg").write_bytes(b"half wri")
    members = {"train2017/a.jpg": b"a", "train2017/b.jpg": b"", "annotations/c.json": b"{}"}
    unzip(write_zip(tmp_path, members), tmp_path)
    assert files_below(tmp_path) == {**members, "train2017/mine.txt": b"keep me"}
    assert not scratch.exists()


LINK = zipfile.ZipInfo("train2017")
LINK.external_attr = (stat.S_IFLNK | 0o777) << 16
OUTSIDE = ["../x", "/x", "a/../../x", "C:/x", "C:x", "a\\..\\x", "./x", "..", "a/" * 500 + "x"]


@pytest.mark.parametrize("members", [{LINK: "/etc"}, *({name: b"escaped"} for name in OUTSIDE)])
def test_a_member_cannot_leave_the_folder(tmp_path, members):
    """A link or a name that could point elsewhere on any system: nothing is extracted."""
    (tmp_path / "root").mkdir()
    path = write_zip(tmp_path, {**members, "train2017/a.jpg": b"a"})
    with pytest.raises((DownloadError, OSError), match="outside the folder|Not a directory"):
        unzip(path, tmp_path / "root")
    assert names(tmp_path) == ["root", "z.zip"]


@pytest.mark.parametrize("kind", ["encrypted", "bomb", "damaged", "damaged, stored", "empty"])
def test_an_invalid_zip_is_refused(tmp_path, kind):
    """The error names the zip, which is kept, and nothing of it is extracted."""
    members = {"empty": {}, "bomb": {"a.jpg": bytes(2**20)}}.get(kind, {"a": b"a", "b.jpg": BODY})
    stored = zipfile.ZIP_STORED if "stored" in kind else zipfile.ZIP_DEFLATED
    path = write_zip(tmp_path, members, stored)
    if kind == "encrypted":
        change_byte(path, path.read_bytes().index(b"PK\x01\x02") + 8)
    if "damaged" in kind:
        change_byte(path, len(BODY) // 2)
    with pytest.raises(DownloadError, match="z.zip is not a valid zip .*: delete it, run again"):
        unzip(path, tmp_path)
    assert names(tmp_path) == ["z.zip"]


def test_damaged_zips(tmp_path):
    """Whichever bytes are changed, there is a clear error or no file outside the folder."""
    rng = np.random.default_rng(0)
    for number in range(100):
        outer = tmp_path / str(number)
        outer.mkdir()
        path = write_zip(outer, {"train2017/a.jpg": b"abc" * 9, "b.json": b"{}"})
        for _ in range(rng.integers(1, 4)):
            change_byte(path, rng.integers(10**6), rng.integers(1, 256))
        try:
            unzip(path, outer / "root")
        except (DownloadError, OSError):
            assert names(outer / "root") == []
        assert {name.split("/")[0] for name in names(outer)} <= {"z.zip", "root"}


def test_a_full_disk_while_unzipping_keeps_the_zip(tmp_path, server):
    """Partly extracted files are deleted; the zip is extracted by the next call."""
    tree, full = serve_coco(server), OSError(errno.ENOSPC, "No space left on device")
    with (
        mock.patch.object(zipfile.shutil, "copyfileobj", side_effect=full),
        pytest.raises(DownloadError, match="No space left .*; free disk space"),
    ):
        get(server, tmp_path)
    assert names(tmp_path) == ["annotations_trainval2017.zip"]
    get(server, tmp_path)
    assert files_below(tmp_path) == tree


# ---------------------------------------------------------------------------- download_coco


def get(server, root, **options):
    return download_coco(root, base_url=f"{server.url}/", **options)


def write_captions(root, content):
    (root / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (root / "annotations" / f"captions_{split}.json").write_text(json.dumps(content))


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
        images = [image_name(folder.name, index) for index in kept]
        assert files_below(folder) == {name: tree[f"{folder.name}/{name}"] for name in images}
    assert get(server, tmp_path, year=year, first=3) == result
    assert len(server.received()) == 1 + 2 * 3


def test_images_are_added(tmp_path, server):
    """A larger `first` requests only the difference, one beyond the split all of it; later calls
    without `first` lead to all of COCO, and restore an image that was deleted."""
    tree = serve_coco(server)
    get(server, tmp_path, first=2)
    for folder, captions_file in get(server, tmp_path, first=99).values():
        assert len(names(folder)) == len(json.loads(captions_file.read_text())["images"]) == 5
        captions_file.unlink()
    assert len(server.received()) == len(set(server.received())) == 1 + 2 * 5
    (tmp_path / "val2017" / image_name("val2017", 8)).unlink()
    get(server, tmp_path)
    assert tree.items() <= files_below(tmp_path).items()
    assert server.received()[11:] == ["/zips/val2017.zip"]


def test_the_captions_file_is_written_last(tmp_path, server, monkeypatch):
    """It appears, whole, only with all of its images; a later call requests the missing ones."""
    serve_coco(server)
    lost, other = (f"/train2017/{image_name('train2017', index)}" for index in (8, 4))
    body = server.files.pop(lost)
    with pytest.raises(DownloadError, match=f"{lost} .* 404"):
        get(server, tmp_path, first=2)
    server.files[lost] = body
    with monkeypatch.context() as patch:
        patch.setattr(files, "open", FullDisk, raising=False)
        patch.setattr(FullDisk, "space", 10)
        with pytest.raises(DownloadError, match="cannot write .*first2.json .*No space left"):
            get(server, tmp_path, first=2)
    assert names(tmp_path / "annotations") == ["captions_train2017.json", "captions_val2017.json"]
    folder, captions_file = get(server, tmp_path, first=2)["train"]
    assert captions_file.exists() and len(names(folder)) == 2
    assert server.received().count(other) == 1


@pytest.mark.parametrize("reason", [DownloadError, KeyboardInterrupt])
def test_no_image_is_started_after_an_error(tmp_path, monkeypatch, reason):
    """After an error or Ctrl-C only the downloads in progress are finished."""
    started = []

    def fail_first(url, folder):
        started.append(url)
        if len(started) == 1:
            raise reason("stop")
        threading.Event().wait(0.02)

    monkeypatch.setattr(download, "fetch", fail_first)
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(2000)]
    write_captions(tmp_path, {"images": images, "annotations": []})
    with pytest.raises(reason):
        download_coco(tmp_path, first=2000)
    assert len(started) < 200


def test_an_incomplete_zip_is_an_error(tmp_path, server):
    """A zip must contain all images of the captions file."""
    serve_coco(server)
    server.files["/zips/train2017.zip"] = make_zip({"train2017/000000000004.jpg": b"only one"})
    with pytest.raises(DownloadError, match="lacks images of .*captions_train2017.json"):
        get(server, tmp_path)


def test_arguments_and_captions_that_coco_does_not_have(tmp_path):
    """They are a ValueError that names the alternatives or the file, before any request."""
    for wrong in ({"year": 2015}, {"first": 0}):
        with pytest.raises(ValueError, match=r"\(2014, 2017\), first is at least 1"):
            download_coco(tmp_path, **wrong)
    write_captions(tmp_path, {"images": [{}], "annotations": []})
    with pytest.raises(ValueError, match="captions_train2017.json: "):
        download_coco(tmp_path, first=1)


@pytest.mark.parametrize("name", ["../../x.jpg", "/x.jpg", "a/../../../x.jpg", "..", "."])
def test_images_cannot_leave_their_folder(tmp_path, monkeypatch, name):
    """Whatever a captions file calls an image, no file outside the image folder is written."""

    def write(url, part, tag_file):
        part.parent.mkdir(exist_ok=True)
        part.write_text("an image")
        tag_file.write_text("")

    monkeypatch.setattr(download, "_append", write)
    root = tmp_path / "root"
    write_captions(root, {"images": [{"id": 1, "file_name": name}], "annotations": []})
    with contextlib.suppress(DownloadError):
        download_coco(root, first=1)
    folders = {str(Path(name).parent) for name in files_below(tmp_path)}
    assert folders <= {f"root/{name}" for name in ("annotations", "train2017", "val2017")}


# ---------------------------------------------------------------------------- the command


def command(server, root, *arguments):
    module = [sys.executable, "-m", "captioning.data.download"]
    return [*module, "--root", root, "--base-url", server.url, *arguments]


def test_the_command(tmp_path, server, monkeypatch, capsys):
    """It prints the paths of each split, or one line about what is wrong."""
    serve_coco(server)
    monkeypatch.setattr(sys, "argv", command(server, str(tmp_path), "--first", "2")[2:])
    download.main()
    output = "train: .*\nval: .*val2017 .*captions_val2017.first2.json\n"
    assert re.fullmatch(output, capsys.readouterr().out)
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], "0"])
    with pytest.raises(SystemExit, match="^error: year=2017, .*at least 1$"):
        download.main()


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_command_is_resumed(tmp_path, server, sent):
    """After Ctrl-C, which is explained, and after a kill, the same command resumes."""
    serve_coco(server)
    path = "/annotations/annotations_trainval2017.zip"
    server.files[path] = bytes(2**17) + server.files[path]  # still a zip, but several chunks
    server.faults[path] = ["stall"]
    options = {"cwd": ROOT, "stderr": subprocess.PIPE, "text": True}
    options["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command(server, tmp_path, "--first", "1"), **options)
    assert server.stalled.wait(60)
    part = tmp_path / "annotations_trainval2017.zip.part"
    while process.poll() is None and not (part.exists() and part.stat().st_size):
        threading.Event().wait(0.01)
    process.send_signal(sent)
    message = process.communicate(timeout=10)[1]
    assert sent == signal.SIGKILL or "run the same command again to resume" in message
    assert process.returncode != 0 and part.exists()
    assert get(server, tmp_path, first=1).keys() == {"train", "val"}
    assert server.received("Range")[1]
