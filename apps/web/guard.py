"""Restricts a Gradio server to the requests of its own page, and deletes the uploads.

Gradio 6.31 refuses files that were not uploaded, unknown values and damaged requests. But it sends
uploads to anyone, fetches any public address that a client names, and accepts any amount of data.
"""

import contextlib
import json
import os
import re
import time
from pathlib import Path

from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import JSONResponse

MAX_EVENT_BYTES = 2**20  # of a request that is not an upload
MAX_UPLOAD_BYTES = 201 * 2**20  # of an upload: ten photos of 20 MB
MAX_STORED_BYTES = 2**30  # of all uploads together
JOIN, UPLOAD = "/gradio_api/queue/join", "/gradio_api/upload"
PAGE = (
    r"/(config|theme\.css|favicon\.ico|manifest\.json|(assets|static|svelte)/.+)?"
    r"|/gradio_api/(info|theme\.css|startup-events|upload_progress|queue/data|heartbeat/\w+)"
)
ALLOWED = {"GET": PAGE, "HEAD": PAGE, "POST": rf"{JOIN}|{UPLOAD}|/gradio_api/(reset|cancel)"}
# The browser contacts no other server. Gradio compiles the templates of its components ("eval").
POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; "
    "base-uri 'self'; form-action 'none'; frame-ancestors 'none'"
)


class Guard(BaseHTTPMiddleware):
    """Refuses, with a sentence as JSON, every request that the page does not make.

    folder: that of the uploads; an event can name no other file, and no address.
    """

    def __init__(self, app, folder):
        super().__init__(app)
        self.folder = Path(folder).resolve()
        self.arriving = 0  # bytes of the uploads in progress

    async def dispatch(self, request, call_next):
        path, size = request.scope["path"], int(request.headers.get("content-length", 0))
        new = size if path == UPLOAD else 0
        if not re.fullmatch(ALLOWED.get(request.method, "(?!)"), path):
            return refusal(404, "there is no such page")
        if "transfer-encoding" in request.headers:
            return refusal(411, "a request must state its length")
        if size > (MAX_UPLOAD_BYTES if new else MAX_EVENT_BYTES):
            return refusal(413, "the request is too large: send fewer or smaller photos")
        if new and stored_bytes(self.folder) + self.arriving + new > MAX_STORED_BYTES:
            return refusal(507, "there is no space for more photos now: try again in some minutes")
        if path == JOIN and not self.names_uploads(await request.body()):
            return refusal(403, "an event can only name uploaded files")
        self.arriving += new
        try:
            response = await call_next(request)  # returns when the upload has been received
        finally:
            self.arriving -= new
        response.headers["Content-Security-Policy"] = POLICY
        return response

    def names_uploads(self, body) -> bool:
        """Whether each "path" anywhere in a JSON document is in the folder of the uploads."""

        def check(item):
            if "path" in item and self.folder not in Path(item["path"]).resolve().parents:
                raise ValueError("not an upload")

        try:
            json.loads(body, object_hook=check)
        except (ValueError, TypeError, RecursionError):  # also damaged JSON, or a path like 3
            return False
        return True


def refusal(status, sentence):
    return JSONResponse({"detail": sentence}, status)  # the form in which the page expects it


def stored_bytes(folder) -> int:
    """The size of all files in a folder and its subfolders."""
    total = 0
    for path in Path(folder).rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
            total += path.lstat().st_size
    return total


def delete_old_files(folder, seconds, known=()):
    """Delete what has not been modified for so many seconds, also from the sets of paths `known`.

    Gradio's `delete_cache` would leave the files of interrupted uploads, and all folders.
    """
    for path in sorted(Path(folder).rglob("*"), reverse=True):  # files before their folders
        with contextlib.suppress(OSError):  # deleted meanwhile, or a folder that is not empty
            if time.time() - path.lstat().st_mtime >= seconds:
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    for paths in known:
        paths.difference_update([path for path in paths.copy() if not os.path.lexists(path)])
