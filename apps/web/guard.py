"""Restricts a Gradio server to what its page needs, and deletes the uploads.

    gradio_page.launch(app_kwargs={"middleware": [Middleware(Guard, folder="/tmp/uploads")]})

Gradio can send files of its working directory and of its cache, fetch addresses for a client, and
run functions outside its queue. `Guard` rejects all of it before it reaches Gradio.
"""

import contextlib
import json
import os
import re
import time
from pathlib import Path

MAX_EVENT_BYTES = 2**20  # of a request that starts an event

# The only paths that are served. Not among them: /file=.., /proxy=.., /stream/.., /run/.., /call/..
GET = re.compile(
    r"/(config|theme\.css|favicon\.ico|manifest\.json|(assets|static|svelte)/[\w./@-]+)?"
    r"|/gradio_api/(info|theme\.css|startup-events|upload_progress|queue/data|heartbeat/\w+)"
)
JOIN, UPLOAD = "/gradio_api/queue/join", "/gradio_api/upload"
POST = re.compile(rf"{JOIN}|{UPLOAD}|/gradio_api/(reset|cancel)")

# The browser contacts no other server. Gradio compiles the templates of its components ("eval").
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "font-src 'self' data:; script-src 'self' 'unsafe-inline' 'unsafe-eval'; object-src 'none'; "
    "base-uri 'self'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Guard:
    """ASGI middleware that answers requests for anything else with an error.

    folder: that of the uploads; the events of a client may name no file outside.
    max_upload: bytes of one upload request. max_stored: bytes of all files in `folder`.
    """

    def __init__(self, app, folder, max_upload=200 * 2**20, max_stored=2**30):
        self.app, self.folder = app, Path(folder).resolve()
        self.max_upload, self.max_stored = max_upload, max_stored
        self.arriving = 0  # bytes of the uploads in progress

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close"})
        headers = {name.lower(): value for name, value in scope["headers"]}
        is_upload = scope["path"] == UPLOAD
        problem = self.problem(scope["method"], scope["path"], headers)
        if not problem and scope["path"] == JOIN:
            body = await _read(receive)
            receive = _replay(body, receive)
            if not self.files_are_uploads(body):
                problem = 403, "an event may only name uploaded files"
        if problem:
            return await _respond(send, *problem)
        size = int(headers[b"content-length"]) if is_upload else 0
        self.arriving += size
        try:
            await self.app(scope, receive, _with_headers(send))
        finally:
            self.arriving -= size

    def problem(self, method, path, headers):
        """Why a request is rejected, as (status, sentence); None if it may pass."""
        if method not in ("GET", "HEAD", "POST"):
            return 405, "this method is not allowed"
        if not (POST if method == "POST" else GET).fullmatch(path) or ".." in path:
            return 404, "there is no such page"
        if method != "POST":
            return None
        size = headers.get(b"content-length", b"")
        if b"transfer-encoding" in headers or not re.fullmatch(rb"\d{1,15}", size):
            return 411, "a request must state its length"
        if int(size) > (self.max_upload if path == UPLOAD else MAX_EVENT_BYTES):
            return 413, "the request is too large: send fewer or smaller photos"
        if path == UPLOAD and stored_bytes(self.folder) + self.arriving + int(size) > (
            self.max_stored
        ):
            return 507, "the server has no space for more photos now: try again in some minutes"
        return None

    def files_are_uploads(self, body) -> bool:
        """Whether each "path" in a JSON document is that of a regular file in the folder."""
        try:
            paths = list(_paths(json.loads(body)))
            return all(self.is_upload(path) for path in paths)
        except (ValueError, RecursionError):
            return False

    def is_upload(self, path) -> bool:
        """Whether `path` is a file in the folder, or was one; links are followed."""
        if not isinstance(path, str) or not os.path.isabs(path) or "\0" in path:
            return False
        return self.folder in Path(path).resolve().parents and ".." not in Path(path).parts


def _paths(value):
    """All values of "path" anywhere in a JSON value."""
    if isinstance(value, dict):
        if "path" in value:
            yield value["path"]
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _paths(item)


async def _read(receive) -> bytes:
    """The body of a request, whose length `Guard.problem` has limited."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


def _replay(body, receive):
    """A `receive` that returns `body`, then waits for what follows it."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay():
        return messages.pop() if messages else await receive()

    return replay


def _with_headers(send):
    async def send_with_headers(message):
        if message["type"] == "http.response.start":
            extra = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
            message = {**message, "headers": [*message["headers"], *extra]}
        await send(message)

    return send_with_headers


async def _respond(send, status, sentence):
    """Send an error as JSON, in the form in which Gradio's page expects one."""
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    start = {"type": "http.response.start", "status": status, "headers": headers}
    await _with_headers(send)(start)
    await send({"type": "http.response.body", "body": json.dumps({"detail": sentence}).encode()})


# ---------------------------------------------------------------------------- uploads


def stored_bytes(folder) -> int:
    """The size of all files in a folder and its subfolders."""
    total = 0
    for path in Path(folder).rglob("*"):
        with contextlib.suppress(OSError):  # deleted meanwhile
            total += path.lstat().st_size
    return total


def delete_old_files(folder, seconds, known=()):
    """Delete what has not been modified for so many seconds in `folder`.

    known: sets of paths, in which Gradio keeps the files of its users; deleted files are removed
        from them, or they would grow without limit.
    """
    for path in sorted(Path(folder).rglob("*"), reverse=True):  # files before their folders
        with contextlib.suppress(OSError):  # deleted meanwhile, or a folder that is not empty
            if time.time() - path.lstat().st_mtime >= seconds:
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    for paths in known:
        paths.difference_update([path for path in paths.copy() if not os.path.lexists(path)])
