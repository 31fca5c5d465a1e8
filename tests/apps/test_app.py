"""The page: requests by hand to a running server, and a browser (if they are installed)."""

import contextlib
import json
import re
import runpy
import shutil
import socket
import sys
import time
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from unittest import mock

import pytest
from test_describe import random_model

pytest.importorskip("gradio", reason="needs apps/web/requirements.txt")
from apps.web import app


@pytest.fixture(scope="module")
def photos(shared_dataset):
    return sorted((shared_dataset / "images").glob("*.jpg"))[:3]


@pytest.fixture(scope="module")
def server(tmp_path_factory, photos):
    """(port, folder of the uploads, blocks) of a server with a random model and two examples."""
    folder = tmp_path_factory.mktemp("uploads")
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    blocks = app.serve(random_model(), folder, port=port, examples=photos[:2])
    yield port, folder, blocks
    blocks.close(verbose=False)


# ---------------------------------------------------------------------------- the command


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts the program in another folder, as a new process would."""
    own = re.compile(r"(apps|captioning|model|vocabulary)\b")

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [app.__file__, *arguments])
        monkeypatch.setattr(sys, "path", [x for x in sys.path if Path(x).resolve() != app.ROOT])
        with mock.patch.dict(sys.modules), mock.patch("signal.signal"):
            for name in filter(own.match, [*sys.modules]):
                del sys.modules[name]
            runpy.run_path(app.__file__, run_name="__main__")

    return run


def test_a_missing_checkpoint_is_one_sentence(start, capsys):
    """Started in any folder, without a checkpoint the program ends with a sentence and status 1."""
    with pytest.raises(SystemExit, match="^1$"):
        start("--checkpoint", "none.pt")
    assert capsys.readouterr().err == "error: there is no file none.pt\n"


def test_a_missing_gradio_is_one_sentence(start, monkeypatch):
    """Without Gradio the program says what to install."""
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match=r"^error: .*gradio.*apps/web/requirements.txt$"):
        start()


def test_the_address(server, tmp_path):
    """The server listens on the loopback address alone; a port that is in use is reported."""
    assert server[2].server_name == "127.0.0.1"
    with pytest.raises(OSError, match=f"port {server[0]} .*--port"):
        app.serve(random_model(), tmp_path, port=server[0])


# ---------------------------------------------------------------------------- requests by hand


FORM = {"Content-Type": "multipart/form-data; boundary=x"}
UPLOAD = "POST", "/gradio_api/upload"


def request(server, method, path, body=b"", **headers):
    """(status, body) of the response to a request."""
    connection = HTTPConnection("127.0.0.1", server[0], timeout=20)
    headers = {"Host": "localhost", "Content-Type": "application/json"} | headers
    with contextlib.closing(connection):
        with contextlib.suppress(ConnectionError):  # it answers before it has read a large file
            connection.request(method, path, body, headers)
        response = HTTPResponse(connection.sock)
        response.begin()
        return response.status, response.read()


def form(content=b"no photo", name="../../../photo.jpg"):
    """The body of an upload."""
    header = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    return header.encode() + content + b"\r\n--x--\r\n"


def upload(server, content=b"no photo"):
    """The path on the server of an uploaded file: in the folder of uploads, whatever its name."""
    status, answer = request(server, *UPLOAD, form(content), **FORM)
    (path,) = json.loads(answer)
    assert status == 200 and server[1] in Path(path).parents and ".." not in path
    return path


def event(server, path, *options, fn_index=0, data=None):
    """(status, everything that the server answers) for an event with a file at `path`."""
    session = f"session{time.time_ns()}"
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    options = [*options, *["beam search", 5, 1.0, 0][len(options) :]]
    data = data or [[file], *options]
    body = json.dumps({"data": data, "fn_index": fn_index, "session_hash": session})
    status, answer = request(server, "POST", "/gradio_api/queue/join", body.encode())
    if status == 200:
        answer += request(server, "GET", f"/gradio_api/queue/data?session_hash={session}")[1]
    return status, answer.decode()


@pytest.mark.parametrize("file", ["/etc/passwd", "README.md", "apps/web/app.py"])
def test_no_file_can_be_read(server, file):
    """Neither a request nor an event reads a file that is not an upload."""
    assert request(server, "GET", f"/gradio_api/file={file}")[0] in (403, 404)
    assert "<article" not in event(server, str(Path(file).resolve()))[1]


def test_another_host_name(server):
    """A request under a name that is not this computer's is refused."""
    assert request(server, "GET", "/", Host="evil.example")[0] == 400


OPTIONS = """"", 5, 1|"beam search", 0, 1|"beam search", 11, 1|"beam search", NaN, 1|
    "sampling", 5, 0|"sampling", 5, 1e9|"sampling", 5, NaN|"beam search", 5, 1, -1|
    "beam search", 5, 1, 16"""


def test_options_out_of_range(server, photos):
    """An option that is out of range is an error."""
    path = upload(server, photos[0].read_bytes())
    assert "<article" in event(server, path, "sampling", 5, 1)[1]
    for options in OPTIONS.split("|"):
        assert "<article" not in event(server, path, *json.loads(f"[{options}]"))[1], options


def test_a_state_is_not_set_by_a_client(server):
    """The list of the photos to caption again is kept on the server: a client's is ignored."""
    for index in range(len(server[2].fns)):
        data = [[str(app.ROOT / "photos" / "cat.jpg")], "beam search", 5, 1.0]
        status, answer = event(server, "", fn_index=index, data=data)
        assert status == 200 and "<article" not in answer and "cat.jpg: " not in answer


# ---------------------------------------------------------------------------- uploads


def test_large_files(server):
    """A file over 20 MB is refused."""
    status, answer = request(server, *UPLOAD, form(bytes(app.MAX_FILE_BYTES + 1)), **FORM)
    assert status == 413 and b"size" in answer


# ---------------------------------------------------------------------------- browser


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    names = "chromium", "chromium-browser", "google-chrome", "chrome"
    program = next(filter(None, map(shutil.which, names)), None) or pytest.skip("needs Chromium")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


INPUT = "#photos input[type=file]"


@pytest.fixture
def page(server, browser):
    """The page in a new window; `page.addresses` are those of all requests of the browser."""
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.set_default_timeout(25_000)
    page.addresses, page.errors = [], []
    page.context.on("request", lambda request: page.addresses.append(request.url))
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(f"http://127.0.0.1:{server[0]}/")
    page.wait_for_selector(INPUT, state="attached")
    yield page
    page.close()


def add(page, photos):
    page.set_input_files(INPUT, photos)
    page.wait_for_selector(".photo .caption")


def test_captions_appear(page, photos):
    """Uploaded photos are shown with a caption, alternatives, and a map for each
    word; all pictures are loaded. At a width of 390 pixels nothing extends beyond the window.
    """
    add(page, photos)
    # One of the captions is empty.
    expected = [caption or "(no words)" for caption in random_model().caption(photos, beam_size=5)]
    assert page.locator(".photo .caption").all_inner_texts() == expected and not page.errors
    assert page.locator(".photo:first-child .alternatives li").count() == 4
    words = page.locator(".photo:last-child .maps figcaption").all_inner_texts()
    assert words == expected[-1].split()
    loaded = "images => images.every(image => image.complete && image.naturalWidth > 0)"
    assert page.eval_on_selector_all("img", loaded)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_bad_file_and_back(page, photos, tmp_path):
    """A bad file is a sentence, and the next photo is captioned as usual."""
    bad = tmp_path / "<i>{{1}}.jpg"
    bad.write_text("no photo")
    page.set_input_files(INPUT, bad)
    page.wait_for_selector("#results .error")
    assert "not an image" in page.inner_text("#results .error")
    assert page.locator(".photo, #results .error i").count() == 0
    add(page, photos[0])
    assert page.locator("#results .error").count() == 0


def test_pasted_photos(page, photos):
    """A photo that is pasted anywhere in the page is captioned."""
    paste = """bytes => {
        const file = new File([new Uint8Array(bytes)], "image.png", {type: "image/png"});
        const data = new DataTransfer();
        data.items.add(file);
        document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: data}));
    }"""
    page.evaluate(paste, list(photos[0].read_bytes()))
    page.wait_for_selector(".photo .caption")


def test_example_photos(page, photos):
    """A click on an example photo captions it without an upload."""
    page.get_by_label("Example 01").click()
    page.wait_for_selector(".photo .caption")
    assert page.inner_text(".photo .caption") == random_model().caption(photos[1], beam_size=5)[0]
    assert not any("upload" in address for address in page.addresses)


def test_decoding_controls(page, photos):
    """Other settings caption the photo again, and show the control that belongs to them."""
    add(page, photos[2])  # of which there are different samples
    page.fill("#beam input[type=number]", "1")
    page.press("#beam input[type=number]", "Enter")
    page.wait_for_selector(".photo .alternatives li", state="detached")
    page.get_by_label("sampling").check()
    page.get_by_label("Temperature").first.wait_for()
    page.wait_for_selector(".photo .alternatives li")


def test_no_request_leaves_the_computer(server, page, photos):
    """The browser contacts the server alone."""
    add(page, photos[0])
    page.wait_for_timeout(1000)
    own = f"http://127.0.0.1:{server[0]}/", "data:", "blob:"
    assert len(page.addresses) > 5
    assert [address for address in page.addresses if not address.startswith(own)] == []
