"""The requests that may pass to Gradio, and the deletion of uploads."""

import asyncio
import json
import os

import pytest

from apps.web.guard import HEADERS, Guard, delete_old_files, stored_bytes


async def inner(scope, receive, send):
    """An application that answers with the body it receives."""
    body = (await receive())["body"] if scope["method"] == "POST" else b""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def request(guard, method, path, body=b"", **headers):
    """The status, headers and body of a response; the body of the request comes in two parts."""
    parts = [body[:3], body[3:]]
    headers = {"content_length": str(len(body)), **headers}
    headers = [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": headers}
    sent = []

    async def receive():
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message):
        sent.append(message)

    asyncio.run(guard(scope, receive, send))
    return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"]


@pytest.fixture
def guard(tmp_path):
    (tmp_path / "uploads").mkdir()
    return Guard(inner, tmp_path / "uploads", max_upload=1000, max_stored=1500)


PAGE = [
    "/",
    "/config",
    "/assets/index-3.js",
    "/theme.css",
    "/gradio_api/queue/data",
    "/gradio_api/heartbeat/x1",
]


@pytest.mark.parametrize("path", PAGE)
def test_the_page_is_served(guard, path):
    """What the page needs passes."""
    assert request(guard, "GET", path)[0] == 200


FORBIDDEN = [
    "/gradio_api/file=/etc/passwd",
    "/gradio_api/file=README.md",
    "/file=/etc/passwd",
    "/gradio_api/file/etc/passwd",
    "/gradio_api/proxy=http://127.0.0.1/",
    "/gradio_api/stream/a/b",
    "/static/../app.py",
    "/assets/../../etc/passwd",
    "/static//etc/passwd/../x",
    "//etc/passwd",
    "/gradio_api/runs",
    "/monitoring",
    "/docs",
    "/gradio_api/custom_component/a/client/b/c",
    "/\n",
    "/config\n",
    "/GRADIO_API/file=/etc/passwd",
]


@pytest.mark.parametrize("path", FORBIDDEN)
def test_no_other_page(guard, path):
    """Every other path is unknown, among them all that serve files or fetch addresses."""
    assert request(guard, "GET", path)[0] == 404


@pytest.mark.parametrize(
    "path",
    [
        "run/upload",
        "call/upload",
        "call/v2/upload",
        "api/upload",
        "component_server",
        "vibe-edit",
        "queue/join/",
    ],
)
def test_no_function_outside_the_queue(guard, path):
    """Functions can be run through the queue alone."""
    assert request(guard, "POST", f"/gradio_api/{path}", b"{}")[0] == 404


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "get"])
def test_methods(guard, method):
    """Methods other than GET, HEAD and POST are rejected."""
    assert request(guard, method, "/")[0] == 405


def join(guard, path, **fields):
    body = json.dumps({"data": [[{"x": {"path": path, **fields}}], 5]}).encode()
    status, _, echoed = request(guard, "POST", "/gradio_api/queue/join", body)
    assert (status, echoed) == (200, body) or status == 403
    return status


def test_an_uploaded_file_passes(guard):
    """An event may name an upload, also one that has been deleted; its body stays the same."""
    assert join(guard, str(guard.folder / "ab" / "photo.jpg")) == 200


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "README.md",
        "{}",
        "{}/../secret.txt",
        "{}/a/../b.jpg",
        "{}/link.jpg",
        "{}/folder/secret.txt",
        "{}-other/x.jpg",
        "http://127.0.0.1/x.jpg",
        "file://{}/x.jpg",
        "{}/a\0.jpg",
        "",
        None,
        3,
        ["/etc/passwd"],
        {"path": "/etc/passwd"},
    ],
    ids=repr,
)
def test_no_other_file(guard, tmp_path, path):
    """An event may not name a file elsewhere, an address, or a link that leads elsewhere."""
    (tmp_path / "secret.txt").write_text("secret")
    (guard.folder / "link.jpg").symlink_to(tmp_path / "secret.txt")
    (guard.folder / "folder").symlink_to(tmp_path)
    if isinstance(path, str):
        path = path.replace("{}", str(guard.folder))
    assert join(guard, path) == 403


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 100_000, b"\xff\xfe"], ids=len)
def test_damaged_events(guard, body):
    """An event that is not JSON is rejected."""
    assert request(guard, "POST", "/gradio_api/queue/join", body)[0] == 403


def test_large_events(guard):
    """An event of more than 1 MiB is rejected before it is read."""
    assert request(guard, "POST", "/gradio_api/queue/join", b" " * (2**20 + 1))[0] == 413


@pytest.mark.parametrize(
    "headers",
    [
        {"content_length": ""},
        {"content_length": "-1"},
        {"content_length": "1e3"},
        {"transfer_encoding": "chunked"},
    ],
    ids=str,
)
def test_requests_of_unknown_length(guard, headers):
    """A request must state its length, so that a limit can be applied to it."""
    assert request(guard, "POST", "/gradio_api/upload", b"x", **headers)[0] == 411


def test_large_uploads(guard):
    """An upload over `max_upload` is rejected, one below passes."""
    statuses = [request(guard, "POST", "/gradio_api/upload", b"x" * n)[0] for n in (1000, 1001)]
    assert statuses == [200, 413]


def test_full_folder(guard):
    """Uploads are rejected while their folder would exceed `max_stored`."""
    (guard.folder / "photo.jpg").write_bytes(b"x" * 1000)
    statuses = [request(guard, "POST", "/gradio_api/upload", b"x" * n)[0] for n in (500, 501)]
    assert statuses == [200, 507] and guard.arriving == 0


@pytest.mark.parametrize("path", ["/", "/gradio_api/file=/etc/passwd"])
def test_headers(guard, path):
    """Every response forbids the browser to contact other servers."""
    _, headers, _ = request(guard, "GET", path)
    assert {k.lower().encode(): v.encode() for k, v in HEADERS.items()}.items() <= headers.items()


def test_websockets_are_closed(guard):
    """The page uses no WebSocket; one is closed."""
    sent = []

    async def send(message):
        sent.append(message["type"])

    asyncio.run(guard({"type": "websocket", "path": "/"}, None, send))
    assert sent == ["websocket.close"]


# ---------------------------------------------------------------------------- uploads


def write(path, age=0.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"photo")
    for item in (path, path.parent):
        os.utime(item, (os.stat(item).st_atime, os.stat(item).st_mtime - age))
    return path


def test_old_files_are_deleted(tmp_path):
    """Files of the given age and their folders are deleted, newer ones stay."""
    new, old = write(tmp_path / "a" / "new.jpg"), write(tmp_path / "b" / "old.jpg", age=100)
    delete_old_files(tmp_path, 60)
    assert new.exists() and not old.exists()
    delete_old_files(tmp_path, 0)
    delete_old_files(tmp_path, 0)
    assert not list(tmp_path.iterdir())


def test_deleted_files_are_forgotten(tmp_path):
    """Gradio's sets keep the paths of existing files only."""
    new, old = write(tmp_path / "a" / "new.jpg"), write(tmp_path / "b" / "old.jpg", age=100)
    known = {str(new), str(old)}
    delete_old_files(tmp_path, 60, [known])
    assert known == {str(new)}


def test_links_are_not_followed(tmp_path):
    """A link is deleted itself, and what it leads to stays."""
    kept = write(tmp_path / "outside" / "kept.jpg", age=100)
    (tmp_path / "uploads").mkdir()
    (tmp_path / "uploads" / "link").symlink_to(kept.parent)
    delete_old_files(tmp_path / "uploads", 0)
    assert kept.exists() and not list((tmp_path / "uploads").iterdir())


def test_stored_bytes(tmp_path):
    """The size of a folder is that of the files in it and in its subfolders."""
    write(tmp_path / "a" / "b" / "photo.jpg")
    write(tmp_path / "photo.jpg")
    sizes = [path.lstat().st_size for path in tmp_path.rglob("*")]
    assert stored_bytes(tmp_path) == sum(sizes) >= 10
