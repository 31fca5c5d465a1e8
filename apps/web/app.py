"""A page in the browser that captions photos.

    pip install -r requirements.txt -r apps/web/requirements.txt
    python apps/web/app.py                                # opens http://127.0.0.1:7860

The page is for the computer on which it runs: the server listens on its loopback address alone, and
neither the server nor the page makes a request to any other. Photos travel inside the page, see
describe.py.
"""

import argparse
import os
import signal
import socket
import sys
import tempfile
from functools import partial
from pathlib import Path

from PIL import ImageOps

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))  # so that the program runs from any folder
try:
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from apps.web.describe import BEAM, MAX_PHOTOS, SAMPLING, cards, data_url, escape
    from captioning.data.images import load_image
    from model import PRETRAINED, CaptionModel
except ImportError as error:
    raise SystemExit(f"error: {error}; pip install -r {HERE / 'requirements.txt'}") from None

HOST = "127.0.0.1"
MAX_FILE_BYTES = 20 * 2**20
KEPT_SECONDS = 600  # an upload is deleted after this time


def page(model, examples=()):
    """The page as `gradio.Blocks`; `examples` are files on the server that it offers."""
    limits = {"concurrency_id": "model", "concurrency_limit": 2}  # requests answered at once
    hint = f"Drop or paste photos (up to {MAX_PHOTOS})"
    deletion = KEPT_SECONDS // 10, KEPT_SECONDS  # how often, and of which age
    with gr.Blocks(title="Photo captioner", delete_cache=deletion) as blocks:
        gr.HTML(f"<h1>Photo captioner</h1><p>{escape(model.card['summary'])}</p>", elem_id="title")
        shown = gr.State([])  # paths of the photos; a client cannot change a state
        accepted = {"file_count": "multiple", "file_types": ["image"]}
        photos = gr.File(label=hint, height=140, elem_id="photos", **accepted)
        with gr.Row(elem_id="examples"):
            pictures = [gr.HTML(example(path)) for path in examples]
        with gr.Row():
            method = gr.Radio([BEAM, SAMPLING], value=BEAM, label="Decoding", min_width=280)
            beam = gr.Slider(1, 10, 5, step=1, label="Beam size", elem_id="beam")
            heat = gr.Slider(0.1, 2, 1, step=0.1, label="Temperature", visible=False)
            shortest = gr.Slider(0, 15, 0, step=1, label="Minimum words", elem_id="min-len")
        results = gr.HTML(elem_id="results")
        options = [method, beam, heat, shortest]

        def caption(paths, method, beam_size, temperature, min_len):
            # A client can send 2.5.
            return cards(model, paths, method, int(beam_size), temperature, int(min_len))

        def add(paths, *options):
            return None, paths, caption(paths, *options)

        def show(method):
            return gr.update(visible=method == BEAM), gr.update(visible=method == SAMPLING)

        photos.upload(add, [photos, *options], [photos, shown, results], **limits)
        for path, picture in zip(examples, pictures, strict=True):
            picture.click(partial(add, [path]), options, [photos, shown, results], **limits)
        for option in options:
            option.change(caption, [shown, *options], results, trigger_mode="always_last", **limits)
        method.change(show, method, [beam, heat])
    return blocks.queue(max_size=32)


def example(path) -> str:
    """HTML of an example photo, as a button."""
    picture = data_url(ImageOps.fit(load_image(path, 152), (152, 152)))
    return f'<button aria-label="Example {path.stem}"><img src="{picture}" alt=""></button>'


def serve(model, folder, port=7860, examples=()):
    """Start the server in the background; uploads go to `folder`. Returns the `gradio.Blocks`.

    Raises OSError if the port is taken.
    """
    try:
        socket.create_server((HOST, port)).close()
    except OSError as error:
        raise OSError(f"port {port} of {HOST}: {error.strerror}; choose another --port") from None
    os.environ.update(GRADIO_TEMP_DIR=str(folder), GRADIO_ANALYTICS_ENABLED="False")
    blocks = page(model, examples)
    blocks.launch(
        server_name=HOST,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,  # no second server in Node.js
        run_history=False,  # the browser stores no photos
        footer_links=[],
        state_session_capacity=100,  # each keeps its last results, about 150 KB per photo
        max_file_size=MAX_FILE_BYTES,
        css_paths=HERE / "app.css",
        head=f"<script>{(HERE / 'app.js').read_text()}</script>",
        theme=gr.themes.Default(primary_hue="blue", font="system-ui", font_mono="monospace"),
        # A page of another site cannot reach the server under a name that leads to this computer.
        app_kwargs={"middleware": [Middleware(TrustedHostMiddleware, [HOST, "localhost"])]},
    )
    return blocks


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description="A page in the browser that captions photos.")
    parser.add_argument("--checkpoint", default=str(PRETRAINED), help="written by train.py")
    parser.add_argument("--port", type=int, default=7860)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the uploads are deleted
    try:
        model = CaptionModel.from_checkpoint(options.checkpoint)
        with tempfile.TemporaryDirectory(prefix="captions-") as folder:
            examples = sorted((ROOT / "photos").glob("*.jpg"))
            blocks = serve(model, folder, options.port, examples)
            print(f"Photo captioner: {blocks.local_url} (Ctrl+C stops it)", flush=True)
            blocks.block_thread()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
