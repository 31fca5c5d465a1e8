"""Execute the five notebooks in order and print a summary of the results.

    python scripts/run_notebooks.py                 # executed copies in runs/notebooks
    python scripts/run_notebooks.py --in-place      # update the committed notebooks themselves
    python scripts/run_notebooks.py -p 'OPTIONS={"epochs": 1}' -p 'RUN_DIR="runs/quick"'

`-p NAME=VALUE` (a Python literal) overrides a line in the parameters cell of every notebook that
has this parameter. The first failing cell ends the run with the notebook, the cell and the error.
"""

import argparse
import ast
import asyncio
import base64
import io
import itertools
import json
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from PIL import Image, ImageChops, ImageStat
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ("0_Dataset", "1_Preliminaries", "2_Training", "3_Inference", "result_show")
SLOW_IMPORTS = "import matplotlib.pyplot, torch, torchvision"
ANSI_COLOUR = re.compile(r"\x1b\[[\d;]*m")


async def execute_all(parameters, out, progress):
    """Execute the notebooks one after the other and write each to `out`.

    While one is executed, the kernel of the next starts and imports the slow packages.
    """
    clients = [make_client(name, parameters) for name in NOTEBOOKS]
    start = asyncio.create_task(start_kernel(clients[0]))
    try:
        for number, name in enumerate(NOTEBOOKS, start=1):
            await start
            if number < len(clients):
                start = asyncio.create_task(start_kernel(clients[number]))
            notebook = clients[number - 1].nb
            async for cell in execute_cells(clients[number - 1]):
                progress(f"notebook {number}/{len(NOTEBOOKS)}, {name}.ipynb, {cell}")
            await shut_down(clients[number - 1])
            clean_outputs(notebook)
            nbformat.write(notebook, out / f"{name}.ipynb")
    finally:
        await asyncio.gather(start, return_exceptions=True)
        for client in clients:
            await shut_down(client, now=True)


def make_client(name, parameters) -> NotebookClient:
    """A client that will execute a notebook with these parameters."""
    notebook = nbformat.read(ROOT / f"{name}.ipynb", as_version=4)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = override(cell.source, parameters)
    return NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        resources={"metadata": {"path": ROOT}},
        coalesce_streams=True,
        extra_arguments=["--log-level=40"],  # errors only
    )


async def start_kernel(client):
    client.create_kernel_manager()
    await client.async_start_new_kernel()
    await client.async_start_new_kernel_client()
    client.kc.execute(SLOW_IMPORTS, silent=True)  # not awaited; the notebook reports any failure


async def execute_cells(client):
    """Execute the cells in order; yields the position of each before it is executed.

    Raises CellExecutionError or DeadKernelError.
    """
    # NotebookClient.execute would do this too, but ignores an interrupt between two notebooks.
    client.reset_execution_trackers()
    for index, cell in enumerate(client.nb.cells):
        yield f"cell {index + 1}/{len(client.nb.cells)}"
        count = client.code_cells_executed + 1
        try:
            await client.async_execute_cell(cell, index, execution_count=count)
        except DeadKernelError:
            if await client.km.is_alive():  # nbclient reports a cancellation as a dead kernel
                raise asyncio.CancelledError from None
            raise
    info = await client.async_wait_for_reply(client.kc.kernel_info())
    client.nb.metadata["language_info"] = info["content"]["language_info"]


async def shut_down(client, now=False):
    """Stop the kernel, if there is one; with `now` without waiting for it."""
    if client.km and client.km.has_kernel:
        await client.km.shutdown_kernel(now=now)
        client.kc.stop_channels()


def clean_outputs(notebook):
    """Remove what would differ after every execution, and compress large figures."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # time stamps
        for output in cell.get("outputs", []):
            compress_figure(output.get("data", {}))
            add_alt_text(output, cell.source)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not is_blank(output)]
    notebook.metadata.pop("widgets", None)


def is_blank(output) -> bool:
    """Whether an output is only the spaces with which a progress bar erased itself."""
    return output.output_type == "stream" and not output.text.strip()


def compress_figure(data, limit=20_000, tolerance=1.0):
    """Compress a PNG.

    A diagram has few colours and sharp lines: it remains a PNG, with 32 colours, if these differ
    from the original ones by less than `tolerance` (of 255) on average. A photograph of more than
    `limit` characters becomes a JPEG, about a fifth of the size.
    """
    if "image/png" not in data:
        return
    figure = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
    reduced = figure.quantize(32, dither=Image.Dither.NONE)
    change = ImageStat.Stat(ImageChops.difference(figure, reduced.convert("RGB"))).mean
    if max(change) < tolerance:
        data["image/png"] = encode(reduced, "PNG")
    elif len(data["image/png"]) > limit:
        del data["image/png"]
        data["image/jpeg"] = encode(figure, "JPEG", quality=60, progressive=True)


def encode(figure, kind, **options) -> str:
    """The file of an image, in base64."""
    file = io.BytesIO()
    figure.save(file, kind, optimize=True, **options)
    return base64.b64encode(file.getvalue()).decode()


def add_alt_text(output, source):
    """Describe a figure with the comment `# alt: ..` at the start of its cell, for nbconvert."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), source.split("\n"))
    text = " ".join(line.lstrip("# ") for line in lines)
    for kind in ("image/png", "image/jpeg"):
        if kind in output.get("data", {}) and text.startswith("alt: "):
            output.metadata = {kind: {"alt": text.removeprefix("alt: ")}}


def override(source, parameters) -> str:
    """The source of a parameters cell with the assigned values replaced."""
    lines = source.split("\n")
    for statement in reversed(ast.parse(source).body):
        name = statement.targets[0].id if isinstance(statement, ast.Assign) else None
        if name in parameters:
            lines[statement.lineno - 1 : statement.end_lineno] = [f"{name} = {parameters[name]!r}"]
    return "\n".join(lines)


def known_parameters() -> set[str]:
    """The names assigned in the parameters cells of the notebooks."""
    names = set()
    for name in NOTEBOOKS:
        for cell in nbformat.read(ROOT / f"{name}.ipynb", as_version=4).cells:
            if "parameters" in cell.metadata.get("tags", []):
                names |= set(re.findall(r"^(\w+) = ", cell.source, re.MULTILINE))
    return names


def parameter(text):
    """The name and the value of NAME=VALUE."""
    name, _, value = text.partition("=")
    try:
        return name.strip(), ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise argparse.ArgumentTypeError(
            f"{text} is not NAME=VALUE with a Python literal as its value; strings need quotes "
            """inside the shell's quotes, as in -p 'DATASET="coco2017"'"""
        ) from None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-p", dest="parameters", action="append", default=[], type=parameter)
    parser.add_argument("--in-place", action="store_true", help="overwrite the notebooks")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "notebooks")
    arguments = parser.parse_args()
    parameters = dict(arguments.parameters)
    unknown = parameters.keys() - known_parameters()
    if unknown:
        parser.error(f"no notebook has a parameter {', '.join(sorted(unknown))}")
    out = ROOT if arguments.in_place else arguments.out
    out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # it prints a warning
    # OpenMP threads that wait actively for long are several times slower beside other processes,
    # such as the next kernel; threads that never do halve the speed of a small model.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    start = time.perf_counter()
    with tqdm(
        bar_format="{desc} [{elapsed}]", disable=not sys.stdout.isatty(), file=sys.stdout
    ) as bar:
        bar.set_description_str("starting a kernel")
        try:
            asyncio.run(execute_all(parameters, out, bar.set_description_str))
        except (CellExecutionError, DeadKernelError) as error:
            bar.close()
            message = ANSI_COLOUR.sub("", str(error))
            print(f"error: in {bar.desc}:\n{message}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            bar.close()
            print(f"interrupted in {bar.desc}", file=sys.stderr)
            return 130
    print(f"all {len(NOTEBOOKS)} notebooks ran in {time.perf_counter() - start:.0f} s")
    report = Path(ROOT, parameters.get("RUN_DIR", "runs/synthetic"), "report.json")
    print_report(json.loads(report.read_text(encoding="utf-8")), out)
    photos = json.loads(report.with_name("photo_captions.json").read_text(encoding="utf-8"))
    print("\nphotographs, captioned by photo_captioner.pt (caption.py captions your own):")
    for name, caption in photos.items():
        print(f"  {name:20s} {caption}")
    return 0


def print_report(report, out):
    """Print the results that 3_Inference wrote to report.json."""
    pairs = report.pop("pairs")
    for name, value in (report | {"notebooks": str(out)}).items():
        print(f"  {name:24s} {value:.3f}" if isinstance(value, float) else f"  {name:24s} {value}")
    for pair in pairs:
        print(f"\n  actual     {pair['actual']}\n  predicted  {pair['predicted']}")


if __name__ == "__main__":
    sys.exit(main())
