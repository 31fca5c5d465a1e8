"""Execute the five notebooks in order and print a summary of the results.

    python scripts/run_notebooks.py                 # executed copies in runs/notebooks
    python scripts/run_notebooks.py --in-place      # update the committed notebooks themselves
    python scripts/run_notebooks.py --in-place 2_Training
    python scripts/run_notebooks.py -p 'OPTIONS={"epochs": 1}' -p 'RUN_DIR="runs/quick"'

`-p NAME=VALUE` (a Python literal) overrides a parameter of every notebook that has it. The first
failing cell ends the run with the notebook, the cell and the error.
"""

import argparse
import ast
import base64
import io
import json
import os
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from PIL import Image, ImageChops, ImageStat
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
# The first code cell of every notebook. It is written here alone; --in-place puts it there.
SETUP = """\
import os
import subprocess
import sys

if not os.path.exists("captioning"):  # opened alone, as on Colab or Kaggle
    address = os.environ.get("REPOSITORY", "https://github.com/OWNER/coco-image-caption")
    subprocess.run(["git", "clone", "-q", address, "coco-image-caption"], check=True)
    os.chdir("coco-image-caption")
    install = [sys.executable, "-m", "pip", "install", "-qr", "requirements.txt"]
    subprocess.run(install, check=True)"""
JPEG_QUALITY = {"result_show": 50}  # a gallery; 23 in the other notebooks
MANY_COLOURS = 2**15  # a picture with more is a photograph, for which a palette is too small
NOTEBOOKS = ("0_Dataset", "1_Preliminaries", "2_Training", "3_Inference", "result_show")


def put_setup(notebook):
    """Replace the cell tagged "setup", or insert it behind the title; its code is hidden."""
    hidden = {"jupyter": {"source_hidden": True}, "transient": {"remove_source": True}}
    metadata = {"tags": ["setup", "hide-input"], **hidden}
    cells = notebook.cells
    cells[:] = [cell for cell in cells if "setup" not in cell.metadata.get("tags", [])]
    cells.insert(1, nbformat.v4.new_code_cell(SETUP, metadata=metadata, id="setup"))


def execute(notebook, name):
    """Execute a notebook in place; an error ends the process with a message."""
    options = {"coalesce_streams": True, "extra_arguments": ["--log-level=40"]}  # errors only
    # Time stamps and widgets would differ after every execution.
    options |= {"record_timing": False, "store_widget_state": False}
    options["shutdown_kernel"] = "immediate"  # an orderly exit takes seconds
    total = len(notebook.cells)
    with tqdm(None, name, total, bar_format="{desc}.ipynb, cell {n}/{total} [{elapsed}]") as bar:
        options["on_cell_start"] = lambda cell, cell_index: bar.update(cell_index + 1 - bar.n)
        try:
            NotebookClient(notebook, resources={"metadata": {"path": ROOT}}, **options).execute()
        except (CellExecutionError, DeadKernelError) as error:
            message = re.sub(r"\x1b\[[\d;]*m", "", str(error))  # without colours
            sys.exit(f"\nerror: in {name}.ipynb, cell {bar.n} of {total}:\n{message}")
    for cell in filter(lambda cell: cell.cell_type == "code", notebook.cells):
        # Of a progress bar that erased itself, the spaces remain.
        cell.outputs = [o for o in cell.outputs if o.output_type != "stream" or o.text.strip()]
        alt = cell.metadata.get("alt")
        for output in (o for o in cell.outputs if "image/png" in o.get("data", {})):
            kind, figure = compress(output.data.pop("image/png"), JPEG_QUALITY.get(name, 23))
            output.data[kind] = figure
            output.metadata = {kind: {"alt": alt}} if alt else {}


def compress(figure, quality=23):
    """The type and content: a JPEG, or a smaller PNG that changes the picture less."""
    image = Image.open(io.BytesIO(base64.b64decode(figure))).convert("RGB")

    def change(other):
        return sum(ImageStat.Stat(ImageChops.difference(image, other.convert("RGB"))).rms)

    image.save(best := io.BytesIO(), "JPEG", optimize=True, progressive=True, quality=quality)
    limit = change(Image.open(best)) / 2  # banding is more visible than the errors of a JPEG
    for colours in (32, 64, 128, 256) if image.getcolors(MANY_COLOURS) else ():
        reduced = image.quantize(colours, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        if change(reduced) > limit:
            continue
        reduced.save(png := io.BytesIO(), "PNG", optimize=True)
        if png.tell() < best.tell():
            return "image/png", base64.b64encode(png.getvalue()).decode()
        break  # more colours take more bytes
    return "image/jpeg", base64.b64encode(best.getvalue()).decode()


def override(notebook, parameters) -> set[str]:
    """Append assignments to the cell tagged "parameters"; returns the names that it has."""
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    known = set(re.findall(r"^(\w+) = ", cell.source, re.MULTILINE))
    cell.source += "".join(f"\n{k} = {v!r}" for k, v in parameters.items() if k in known)
    return known


def parameter(text):
    """The name and the value of NAME=VALUE."""
    name, _, value = text.partition("=")
    try:
        return name.strip(), ast.literal_eval(value.strip())
    except (ValueError, SyntaxError):
        raise argparse.ArgumentTypeError(
            f"{text} is not NAME=VALUE with a Python literal as its value; strings need quotes "
            """inside the shell's quotes, as in -p 'DATASET="coco2017"'"""
        ) from None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="such as 2_Training; default: all five, in order")
    parser.add_argument("-p", dest="parameters", action="append", default=[], type=parameter)
    parser.add_argument("--in-place", action="store_true", help="overwrite the notebooks")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "notebooks")
    arguments = parser.parse_args()
    parameters = dict(arguments.parameters)
    names = arguments.names or NOTEBOOKS
    notebooks = {name: nbformat.read(ROOT / f"{name}.ipynb", as_version=4) for name in names}
    known = set.union(*(override(notebook, parameters) for notebook in notebooks.values()))
    if unknown := parameters.keys() - known:
        parser.error(f"no notebook has a parameter {', '.join(sorted(unknown))}")
    out = ROOT if arguments.in_place else arguments.out
    out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # it prints a warning
    for name, notebook in notebooks.items():
        put_setup(notebook)
        execute(notebook, name)
        nbformat.write(notebook, out / f"{name}.ipynb")
    if arguments.names:
        return
    folder = Path(ROOT, parameters.get("RUN_DIR", "runs/synthetic"))
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    photos = json.loads((folder / "photo_captions.json").read_text(encoding="utf-8"))
    pairs = report.pop("pairs")
    for key, value in (report | {"notebooks": out}).items():
        print(f"  {key:24s}", round(value, 3) if isinstance(value, float) else value)
    for pair in pairs:
        print(f"\n  actual     {pair['actual']}\n  predicted  {pair['predicted']}")
    print("\nphotographs, captioned by photo_captioner.pt (caption.py captions your own):")
    for name, caption in photos.items():
        print(f"  {name:20s} {caption}")


if __name__ == "__main__":
    main()
