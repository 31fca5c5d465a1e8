"""A small COCO on an unreliable server of the loopback interface, for test_download.py."""

import io
import json
import re
import socket
import struct
import threading
import zipfile
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

IDS = [30, 4, 17, 8, 25]  # as in COCO, neither consecutive nor ordered


class Server(ThreadingHTTPServer):
    """Serves `files`; `faults[path]` lists what to do instead at the first requests."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files, self.faults, self.requests = {}, {}, []
        self.stalled, self.release = threading.Event(), threading.Event()
        self.validators = lambda body: {"ETag": f'"{sha256(body).hexdigest()}"'}

    def handle_error(self, request, client_address):
        pass  # clients that disconnect are expected

    def received(self, header="path"):
        """The path, or a header, of every request so far."""
        return [request.get(header) for request in self.requests]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server, path = self.server, self.path
        server.requests.append({**self.headers, "path": path})
        faults = server.faults.get(path, [])
        fault = faults.pop(0) if faults else serve_correctly
        FAULTS.get(fault, fault)(self, server.files.get(path))

    def answer(self, status, body=b"", headers=None):
        """A header that is None is not sent."""
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | (headers or {})).items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def answer_file(self, body, sent=None, length=None):
        """The whole file, or other bytes with its validators and another length."""
        headers = {"Content-Length": length or len(body)} | self.server.validators(body)
        self.answer(200, body if sent is None else sent, headers)

    def answer_range(self, body, start, end):
        headers = {"Content-Range": f"bytes {start}-{end - 1}/{len(body)}"}
        self.answer(206, body[start:end], headers | self.server.validators(body))


def serve_correctly(handler, body):
    """RFC 9110: a range only if If-Range matches, 416 if it begins after the end."""
    if body is None:
        handler.answer(404)
    elif handler.headers["If-Range"] in handler.server.validators(body).values():
        serve_range(handler, body)
    else:
        handler.answer_file(body)


def serve_range(handler, body):
    start = int(re.findall(r"\d+", handler.headers["Range"] or "0")[0])
    if start < len(body):
        handler.answer_range(body, start, len(body))
    else:
        handler.answer(416, headers={"Content-Range": f"bytes */{len(body)}"})


def truncate(handler, body, at=None):
    handler.answer_file(body, body[: len(body) // 2 if at is None else at])


def stall(handler, body):
    truncate(handler, body)
    handler.server.stalled.set()
    handler.server.release.wait(5)


def reset(handler, body):
    truncate(handler, body)
    abort = struct.pack("ii", 1, 0)  # linger for 0 seconds: the connection ends with a RST
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, abort)
    handler.connection.close()


FAULTS = {
    "truncate": truncate,
    "stall": stall,
    "reset": reset,
    "hang up": lambda handler, body: handler.connection.shutdown(socket.SHUT_RDWR),
    "fail": lambda handler, body: handler.answer(500),
    "serve correctly": serve_correctly,
    "ignore range": lambda handler, body: handler.answer_file(body),
    "ignore if-range": serve_range,
    "wrong range": lambda handler, body: handler.answer_range(body, 7, len(body)),
    "short range": lambda handler, body: handler.answer_range(body, len(body) // 2, len(body) - 9),
    "no range": lambda handler, body: handler.answer(206, body, handler.server.validators(body)),
    "announce too much": lambda handler, body: handler.answer_file(body, length=len(body) + 10),
    "send too much": lambda handler, body: handler.answer_file(body, body + b"surplus"),
    "no length": lambda handler, body: handler.answer(200, body, {"Content-Length": None}),
    "web page": lambda handler, body: handler.answer(200, b"<html>", {"Content-Type": "text/html"}),
}


def redirect(target):
    return lambda handler, body: handler.answer(302, headers={"Location": target})


def make_zip(members, compression=zipfile.ZIP_DEFLATED) -> bytes:
    """A zip of {name or ZipInfo: bytes}."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def image_name(split, index):
    """split: with its year."""
    return f"COCO_{split}_{index:012}.jpg" if split.endswith("2014") else f"{index:012}.jpg"


def serve_coco(server, year=2017):
    """Put a COCO of five images per split on the server; returns {path below root: bytes}."""
    tree = {}
    for split in (f"train{year}", f"val{year}"):
        names = {index: image_name(split, index) for index in IDS}
        images = [{"id": index, "file_name": name} for index, name in names.items()]
        texts = [(index, text) for index in IDS for text in ("a cat", "a dog", "a cup")]
        annotations = [
            {"id": number, "image_id": index, "caption": text}
            for number, (index, text) in enumerate(texts)
        ]
        captions = {"info": {"year": year}, "images": images, "annotations": annotations}
        tree[f"annotations/captions_{split}.json"] = json.dumps(captions).encode()
        files = {f"{split}/{n}": sha256(f"{split}{i}".encode()).digest() for i, n in names.items()}
        server.files |= {f"/{path}": content for path, content in files.items()}
        server.files[f"/zips/{split}.zip"] = make_zip(files)
        tree |= files
    annotations = {path: content for path, content in tree.items() if path.endswith(".json")}
    server.files[f"/annotations/annotations_trainval{year}.zip"] = make_zip(annotations)
    return tree
