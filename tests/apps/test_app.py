"""The page: requests by hand to a running server, and a browser (if they are installed)."""

import contextlib
import json
import runpy
import shutil
import socket
import subprocess
import sys
import time
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path

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


def test_a_missing_checkpoint_is_one_sentence(tmp_path):
    """Started in any folder, without a checkpoint the program ends with a sentence and status 1."""
    command = [sys.executable, app.__file__, "--checkpoint", "none.pt"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    error = ended.stderr.strip().splitlines()[-1]
    assert ended.returncode == 1 and error.startswith("error: ") and "none.pt" in error


def test_a_missing_gradio_is_one_sentence(monkeypatch):
    """Without Gradio the program says what to install."""
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match=r"^error: .*gradio.*apps/web/requirements.txt$"):
        runpy.run_path(app.__file__)


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


def form(name="photo.jpg", content=b"no photo"):
    """The body of an upload."""
    header = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    return header.encode() + content + b"\r\n--x--\r\n"


def upload(server, *file):
    """The path on the server of an uploaded file."""
    status, answer = request(server, *UPLOAD, form(*file), **FORM)
    assert status == 200
    return json.loads(answer)[0]


def event(server, path, *options, fn_index=0, data=None):
    """(status, everything that the server answers) for an event with a file at `path`."""
    session = f"session{time.time_ns()}"
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    data = data or [[file], *(options or ["beam search", 5, 1.0])]
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
    "sampling", 5, 0|"sampling", 5, 1e9|"sampling", 5, NaN"""


@pytest.mark.parametrize("options", OPTIONS.split("|"))
def test_options_out_of_range(server, photos, options):
    """An option that is out of range is an error."""
    path = upload(server, "photo.jpg", photos[0].read_bytes())
    assert "<article" in event(server, path, "sampling", 5, 1)[1]
    assert "<article" not in event(server, path, *json.loads(f"[{options}]"))[1]


def test_a_state_is_not_set_by_a_client(server):
    """The list of the photos to caption again is kept on the server: a client's is ignored."""
    for index in range(len(server[2].fns)):
        data = [[str(app.ROOT / "photos" / "cat.jpg")], "beam search", 5, 1.0]
        status, answer = event(server, "", fn_index=index, data=data)
        assert status == 200 and "<article" not in answer and "cat.jpg: " not in answer


# ---------------------------------------------------------------------------- uploads


def test_names_of_uploads(server):
    """An upload stays in the folder of the uploads whatever its name."""
    path = upload(server, "../../../evil.txt")
    assert server[1] in Path(path).parents and ".." not in path


def test_large_files(server):
    """A file over 20 MB is refused."""
    status, answer = request(server, *UPLOAD, form("a", bytes(app.MAX_FILE_BYTES + 1)), **FORM)
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
    """Uploaded photos are shown with a caption, its probability and alternatives."""
    add(page, photos[:2])
    assert page.locator(".photo").count() == 2 and not page.errors
    assert page.locator(".photo:first-child .alternatives li").count() == 4
    expected = random_model().caption(photos[:2], beam_size=5)  # one is empty
    expected = [caption or "(no words)" for caption in expected]
    assert page.locator(".photo .caption").all_inner_texts() == expected


def test_maps_appear(page, photos):
    """There is a map for each word, and all pictures are loaded."""
    add(page, photos[1])
    words = page.locator(".maps figcaption").all_inner_texts()
    assert " ".join(words) == page.inner_text(".photo .caption")
    loaded = "images => images.every(image => image.complete && image.naturalWidth > 0)"
    assert page.eval_on_selector_all("img", loaded)


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
    add(page, photos[0])
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


def test_the_page_fits_a_phone(page, photos):
    """At a width of 390 pixels nothing extends beyond the window."""
    add(page, photos)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
