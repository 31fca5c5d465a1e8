"""The page of app.py: a running server, requests by hand, and a browser (if they are installed)."""

import json
import shutil
import socket
import time
from http.client import HTTPConnection
from pathlib import Path

import pytest
from test_describe import random_model

from apps.web import app
from apps.web.guard import stored_bytes

ROOT = Path(app.__file__).parent


@pytest.fixture(scope="module")
def server(tmp_path_factory, shared_dataset):
    """(port, folder of the uploads, blocks) of a server with a random model and two examples."""
    pytest.importorskip("gradio", reason="needs requirements-app.txt")
    folder = tmp_path_factory.mktemp("uploads")
    examples = sorted((shared_dataset / "images").glob("*.jpg"))[:2]
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    blocks, _ = app.serve(random_model(), folder, port=port, examples=examples)
    yield port, folder, blocks
    blocks.close(verbose=False)


def test_a_missing_checkpoint_is_one_sentence(tmp_path, capsys, monkeypatch):
    """Without a checkpoint the program ends with a sentence and status 1."""
    monkeypatch.setattr("signal.signal", lambda *_: None)  # it would change that of pytest
    assert app.main(["--checkpoint", str(tmp_path / "none.pt")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "none.pt" in error and error.count("\n") == 1


def test_only_this_computer_is_served_by_default(server):
    """The server listens on the loopback address alone."""
    assert server[2].server_name == "127.0.0.1"


def test_a_port_that_is_taken(server, tmp_path):
    """A port that is in use is reported as such."""
    with pytest.raises(OSError, match=f"port {server[0]} .*--port"):
        app.serve(random_model(), tmp_path, port=server[0])


# ---------------------------------------------------------------------------- requests by hand


def request(server, method, path, body=b"", kind="application/json"):
    """(status, body) of a request whose path is sent as it is."""
    connection = HTTPConnection("127.0.0.1", server[0], timeout=20)
    connection.putrequest(method, path, skip_host=False)
    connection.putheader("Content-Type", kind)
    if method == "POST":
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body if method == "POST" else None)
    response = connection.getresponse()
    try:
        return response.status, response.read()
    finally:
        connection.close()


def upload(server, name="photo.jpg", content=b"no photo"):
    """(status, path on the server) after the upload of a file."""
    header = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    body = header.encode() + content + b"\r\n--x--\r\n"
    kind = "multipart/form-data; boundary=x"
    status, answer = request(server, "POST", "/gradio_api/upload", body, kind)
    return status, json.loads(answer)[0] if status == 200 else answer.decode()


def event(server, path, fn_index=0, data=None):
    """(status, everything that the server answers) for an event with a file at `path`."""
    session = f"session{time.time_ns()}"
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    data = [[file], "beam search", 5, 1.0] if data is None else data
    body = json.dumps({"data": data, "fn_index": fn_index, "session_hash": session}).encode()
    status, answer = request(server, "POST", "/gradio_api/queue/join", body)
    if status == 200:
        answer += request(server, "GET", f"/gradio_api/queue/data?session_hash={session}")[1]
    return status, answer.decode()


FILES = [
    "/etc/passwd",
    "/proc/self/environ",
    str(ROOT / "README.md"),
    "README.md",
    "app.py",
    "{}/../secret.txt",
    "{}/link.txt",
    "{}/uploaded",
    str(ROOT / "synthetic_encoder.pt"),
]
ROUTES = [
    "/gradio_api/file=",
    "/file=",
    "/gradio_api/file/",
    "/gradio_api/proxy=file://",
    "/gradio_api/stream/",
    "/static/",
    "/assets/",
    "/static/..%2f..%2f..%2f",
    "//gradio_api/file=",
    "/gradio_api/%66ile=",
    "/svelte/../",
]


@pytest.mark.parametrize("route", ROUTES)
def test_no_file_can_be_read(server, route):
    """No route returns a file: neither of the server nor an upload, under any spelling."""
    folder = server[1]
    (folder.parent / "secret.txt").write_text("secret")
    (folder / "uploaded").write_text("secret")
    if not (folder / "link.txt").is_symlink():
        (folder / "link.txt").symlink_to(ROOT / "README.md")
    for file in FILES:
        status, body = request(server, "GET", route + file.replace("{}", str(folder)))
        assert status in (403, 404) and b"secret" not in body, file


@pytest.mark.parametrize("file", [*FILES[:7], "http://127.0.0.1:9/x.jpg"])
def test_no_event_reads_a_file(server, file):
    """An event that names a file that is no upload, or an address, is rejected."""
    assert event(server, file.replace("{}", str(server[1])))[0] == 403


def test_a_state_is_not_set_by_a_client(server):
    """The list of the photos to caption again is kept on the server: a client's is ignored."""
    for index in range(len(server[2].fns)):
        status, answer = event(server, "", index, [[str(ROOT / "a.jpg")], "beam search", 5, 1.0])
        assert status == 200 and "<article" not in answer and "a.jpg: " not in answer


def test_names_of_uploads(server):
    """An upload stays in the folder of the uploads whatever its name."""
    status, path = upload(server, "../../../evil.txt")
    assert status == 200 and server[1] in Path(path).parents and ".." not in path


def test_large_files(server):
    """A file over 20 MB is rejected, and nothing of it is kept."""
    before = stored_bytes(server[1])
    status, sentence = upload(server, content=b"x" * (app.MAX_FILE_BYTES + 1))
    assert status == 413 and "size" in sentence and stored_bytes(server[1]) - before < 10_000


def test_messages_name_no_folder(server):
    """What the server answers about a damaged upload contains its name, and not its path."""
    path = upload(server, "notes.jpg")[1]
    status, answer = event(server, path)
    html = json.dumps(json.loads(answer.split("data: ")[-2])["output"]["data"][2])
    assert status == 200 and "notes.jpg: " in html and str(server[1]) not in html


def test_uploads_are_deleted(server, monkeypatch):
    """A file of the given age is deleted, whoever uploaded it."""
    path = Path(upload(server)[1])
    app.delete_old_files(server[1], 0, server[2].temp_file_sets)
    assert not path.exists() and str(path) not in set().union(*server[2].temp_file_sets)


# ---------------------------------------------------------------------------- browser


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    names = "chromium", "chromium-browser", "google-chrome", "chrome"
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(server, browser):
    """The page in a new window; `page.addresses` are those of all requests of the browser."""
    context = browser.new_context(viewport={"width": 390, "height": 844})
    page = context.new_page()
    page.set_default_timeout(25_000)
    page.addresses, page.errors = [], []
    context.on("request", lambda request: page.addresses.append(request.url))
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(f"http://127.0.0.1:{server[0]}/")
    page.wait_for_selector(INPUT, state="attached")
    yield page
    context.close()


INPUT = "#photos input[type=file]"


@pytest.fixture(scope="module")
def photos(shared_dataset):
    return [str(path) for path in sorted((shared_dataset / "images").glob("*.jpg"))[:3]]


def test_captions_appear(page, photos):
    """Uploaded photos are shown with a caption, its probability and alternatives."""
    page.set_input_files(INPUT, photos[:2])
    page.wait_for_selector(".photo .caption")
    assert page.locator(".photo").count() == 2 and not page.errors
    assert page.locator(".photo:first-child .alternatives li").count() == 4
    expected = random_model().caption(photos[:2], beam_size=5)
    assert page.locator(".photo .caption").all_inner_texts() == expected  # with words like "<b>"


def test_maps_appear(page, photos):
    """There is a map for each word, and the photo below it is loaded."""
    page.set_input_files(INPUT, photos[0])
    page.wait_for_selector(".maps figure")
    words = page.locator(".maps figcaption").all_inner_texts()
    assert " ".join(words) == page.inner_text(".photo .caption")
    loaded = "images => images.every(image => image.complete && image.naturalWidth > 0)"
    assert page.eval_on_selector_all(".photo img", loaded)


def test_a_bad_file_and_back(page, photos, tmp_path):
    """A bad file is a sentence, and the next photo is captioned as usual."""
    bad = tmp_path / "<i>{{1}}.jpg"
    bad.write_text("no photo")
    page.set_input_files(INPUT, str(bad))
    page.wait_for_selector("#results .error")
    assert "not an image" in page.inner_text("#results .error")
    assert page.locator(".photo, #results .error i").count() == 0
    page.set_input_files(INPUT, photos[0])
    page.wait_for_selector(".photo .caption")
    assert page.locator("#results .error").count() == 0


def test_pasted_photos(page, photos):
    """A photo that is pasted anywhere in the page is captioned."""
    page.evaluate(
        """bytes => {
            const file = new File([new Uint8Array(bytes)], "image.png", {type: "image/png"});
            const data = new DataTransfer();
            data.items.add(file);
            document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: data}));
        }""",
        list(Path(photos[0]).read_bytes()),
    )
    page.wait_for_selector(".photo .caption")


def test_example_photos(page):
    """A click on an example photo captions it without an upload."""
    page.click("[data-index='1']")
    page.wait_for_selector(".photo .caption")
    assert not any("upload" in address for address in page.addresses)


def test_decoding_controls(page, photos):
    """Other settings caption the photo again, and show the control that belongs to them."""
    page.set_input_files(INPUT, photos[0])
    page.wait_for_selector(".photo .alternatives li >> nth=3")
    page.fill("#beam input[type=number]", "1")
    page.press("#beam input[type=number]", "Enter")
    page.wait_for_selector(".photo .alternatives li", state="detached")
    page.get_by_label("sampling").check()
    page.wait_for_selector("#temperature")
    page.wait_for_selector(".photo .alternatives li")


def test_no_request_leaves_the_computer(server, page, photos):
    """The browser contacts the server alone: no fonts, scripts or statistics from elsewhere."""
    page.set_input_files(INPUT, photos[0])
    page.wait_for_selector(".photo .caption")
    page.wait_for_timeout(1000)
    own = f"http://127.0.0.1:{server[0]}/", "data:", "blob:"
    assert len(page.addresses) > 5
    assert [address for address in page.addresses if not address.startswith(own)] == []


def test_the_page_fits_a_phone(page, photos):
    """At a width of 390 pixels nothing extends beyond the window."""
    page.set_input_files(INPUT, photos)
    page.wait_for_selector(".photo .caption")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
