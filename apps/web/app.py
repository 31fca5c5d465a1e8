"""A page in the browser that captions photos.

    pip install -r requirements.txt -r requirements-app.txt
    python app.py --checkpoint photo_captioner.pt     # opens http://127.0.0.1:7860

The page makes no request to any other server, and no file of the server can be read: photos travel
inside the page (describe.py), and guard.py rejects every request that the page does not make.
"""

import argparse
import contextlib
import ctypes
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

from PIL import ImageOps

from apps.web.describe import (
    BEAM,
    MAX_BEAM_SIZE,
    MAX_PHOTOS,
    SAMPLING,
    TEMPERATURES,
    cards,
    data_url,
    escape,
)
from apps.web.guard import Guard, delete_old_files
from captioning.data.images import load_image
from model import PRETRAINED, CaptionModel

ROOT = Path(__file__).resolve().parents[2]
MAX_FILE_BYTES = 20 * 2**20
MAX_STORED_BYTES = 2**30  # of all uploads together
KEPT_SECONDS = 600  # an upload is deleted after this time
AT_ONCE, QUEUED = 2, 32  # requests that are answered at the same time; that wait
SESSIONS = 100  # whose last results Gradio keeps in memory, about 150 KB per photo


def page(model, examples=()):
    """The page as `gradio.Blocks`; `examples` are files on the server that it offers."""
    import gradio as gr  # not a requirement of this module's other functions

    buttons = [
        f'<button data-index="{index}" aria-label="Example {index + 1}">'
        f'<img src="{data_url(ImageOps.fit(load_image(path, 152), (152, 152)))}" alt=""></button>'
        for index, path in enumerate(examples)
    ]
    with gr.Blocks(title="Photo captioner", analytics_enabled=False) as blocks:
        gr.HTML(f"<h1>Photo captioner</h1><p>{escape(model.card['summary'])}</p>", elem_id="title")
        uploaded = gr.State([])  # paths; a client cannot change a state
        photos = gr.File(
            label=f"Drop or paste photos (up to {MAX_PHOTOS})",
            elem_id="photos",
            file_count="multiple",
            file_types=["image"],
            height=140,
        )
        chosen = gr.HTML(
            f'<div class="examples">{"".join(buttons)}</div>',
            elem_id="examples",
            js_on_load=CHOOSE,
            visible=bool(buttons),
        )
        with gr.Row():
            method = gr.Radio([BEAM, SAMPLING], value=BEAM, label="Decoding", min_width=280)
            beam_size = gr.Slider(1, MAX_BEAM_SIZE, 5, step=1, label="Beam size", elem_id="beam")
            temperature = gr.Slider(
                *TEMPERATURES,
                1.0,
                step=0.1,
                label="Temperature",
                elem_id="temperature",
                visible=False,
            )
        results = gr.HTML(elem_id="results")
        options = [method, beam_size, temperature]

        def caption(paths, method, beam_size, temperature):
            beam_size = int(beam_size)  # a client can send any number
            return cards(model, paths, method=method, beam_size=beam_size, temperature=temperature)

        def upload(paths, *values):
            return None, paths or [], caption(paths or [], *values)

        def choose(event: gr.EventData, *values):
            index = event._data.get("index") if isinstance(event._data, dict) else None
            valid = isinstance(index, int) and 0 <= index < len(examples)
            paths = [examples[index]] if valid else []
            return paths, caption(paths, *values)

        def show(value):
            return gr.update(visible=value == BEAM), gr.update(visible=value == SAMPLING)

        shared = {"concurrency_id": "model", "concurrency_limit": AT_ONCE}
        again = {**shared, "trigger_mode": "always_last"}
        photos.upload(upload, [photos, *options], [photos, uploaded, results], **shared)
        chosen.click(choose, options, [uploaded, results], **shared)
        method.change(show, method, [beam_size, temperature])
        for change in (method.change, beam_size.change, temperature.change):
            change(caption, [uploaded, *options], results, **again)
    return blocks.queue(max_size=QUEUED)


CHOOSE = """element.addEventListener("click", event => {
    const button = event.target.closest("[data-index]");
    if (button) trigger("click", {index: Number(button.dataset.index)});
});"""

# Pasted photos go the way of chosen ones.
PASTE = """document.addEventListener("paste", event => {
    const files = event.clipboardData.files, data = new DataTransfer();
    const input = document.querySelector("#photos input[type=file]");
    if (!files.length || !input) return;
    for (const file of files) data.items.add(file);
    input.files = data.files;
    input.dispatchEvent(new Event("change", {bubbles: true}));
});"""


def serve(model, folder, host="127.0.0.1", port=7860, examples=()):
    """Start the server in the background; uploads go to `folder`. Returns (blocks, address).

    Raises OSError if the port is taken.
    """
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise OSError(f"port {port} of {host}: {error.strerror}; choose another --port") from None
    os.environ.update(GRADIO_TEMP_DIR=str(folder), GRADIO_ANALYTICS_ENABLED="False")
    import gradio as gr
    from starlette.middleware import Middleware

    blocks = page(model, examples)
    limits = {"max_upload": MAX_PHOTOS * MAX_FILE_BYTES + 2**20, "max_stored": MAX_STORED_BYTES}
    address = blocks.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        allowed_paths=[],
        blocked_paths=[str(ROOT)],
        state_session_capacity=SESSIONS,
        max_file_size=MAX_FILE_BYTES,
        css_paths=Path(__file__).with_name("app.css"),
        head=f"<script>{PASTE}</script>",
        theme=gr.themes.Default(primary_hue="blue", font="system-ui", font_mono="monospace"),
        app_kwargs={"middleware": [Middleware(Guard, folder=folder, **limits)]},
    )[1]

    def delete_uploads():
        while blocks.is_running:
            delete_old_files(folder, KEPT_SECONDS, blocks.temp_file_sets)
            time.sleep(KEPT_SECONDS / 20)

    threading.Thread(target=delete_uploads, daemon=True).start()
    return blocks, address


def limit_arenas(count=2):
    """Limit the memory that glibc keeps after use: by default an arena per thread, of many."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(-8, count)  # M_ARENA_MAX


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description="A page in the browser that captions photos.")
    parser.add_argument("--checkpoint", default=str(PRETRAINED), help="written by train.py")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: reachable from elsewhere")
    parser.add_argument("--port", type=int, default=7860)
    options = parser.parse_args(arguments)
    limit_arenas()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the uploads are deleted
    try:
        model = CaptionModel.from_checkpoint(options.checkpoint)
        examples = sorted((ROOT / "photos").glob("*.jpg"))
        with tempfile.TemporaryDirectory(prefix="captions-") as folder:
            blocks, address = serve(model, folder, options.host, options.port, examples)
            print(f"Photo captioner: {address} (Ctrl+C stops it)", flush=True)
            blocks.block_thread()
    except ImportError as error:
        print(f"error: {error}; pip install -r requirements-app.txt", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
