"""Execute the five notebooks in order, and say what came of it.

    python run_notebooks.py                     # executed copies go to runs/notebooks
    python run_notebooks.py --in-place          # refresh the committed notebooks themselves
    python run_notebooks.py -p 'OPTIONS={"epochs": 1}' -p 'RUN_DIR="runs/quick"'

`-p NAME=VALUE` (a Python literal) overrides a line of every notebook's parameters cell. A failing
cell stops everything, with the notebook, the cell and the error.
"""

import argparse
import ast
import base64
import io
import json
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
NOTEBOOKS = ("0_Dataset", "1_Preliminaries", "2_Training", "3_Inference", "result_show")
COLOUR = re.compile(r"\x1b\[[\d;]*m")  # an error's terminal colours


def execute(name, parameters, progress):
    """Run one notebook; returns it with its outputs."""
    notebook = nbformat.read(HERE / f"{name}.ipynb", as_version=4)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = override(cell.source, parameters)
    client = NotebookClient(
        notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": HERE}},
        coalesce_streams=True, extra_arguments=["--log-level=40"],  # errors, no chatter
        on_cell_start=lambda cell, cell_index: progress(cell_index, len(notebook.cells)),
    )  # fmt: skip
    client.execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when each cell ran: noise in every diff
        for output in cell.get("outputs", []):
            shrink(output.get("data", {}))
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not is_spent(output)]
    notebook.metadata.pop("widgets", None)
    return notebook


def is_spent(output) -> bool:
    """Is this but the blanks with which a progress bar wiped itself away?"""
    return output.output_type == "stream" and not output.text.strip()


def shrink(data, limit=60_000):
    """Turn a figure full of pictures from PNG into JPEG, a fifth of the size."""
    if len(data.get("image/png", "")) > limit:
        figure = Image.open(io.BytesIO(base64.b64decode(data.pop("image/png"))))
        file = io.BytesIO()
        figure.convert("RGB").save(file, "JPEG", quality=75, optimize=True)
        data["image/jpeg"] = base64.b64encode(file.getvalue()).decode()


def override(source, parameters) -> str:
    """The source of a parameters cell with the assigned values replaced."""
    lines = source.split("\n")
    for statement in reversed(ast.parse(source).body):
        name = statement.targets[0].id if isinstance(statement, ast.Assign) else None
        if name in parameters:
            lines[statement.lineno - 1 : statement.end_lineno] = [f"{name} = {parameters[name]!r}"]
    return "\n".join(lines)


def known_parameters() -> set[str]:
    """The names that the notebooks' parameters cells assign."""
    names = set()
    for name in NOTEBOOKS:
        for cell in nbformat.read(HERE / f"{name}.ipynb", as_version=4).cells:
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
            f"{text} is not NAME=VALUE with a Python literal as its value; text needs quotes that "
            """the shell leaves alone, as in -p 'DATASET="coco2017"'"""
        ) from None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-p", dest="parameters", action="append", default=[], type=parameter)
    parser.add_argument("--in-place", action="store_true", help="write over the notebooks")
    parser.add_argument("--out", type=Path, default=HERE / "runs" / "notebooks")
    arguments = parser.parse_args()
    parameters = dict(arguments.parameters)
    unknown = parameters.keys() - known_parameters()
    if unknown:
        parser.error(f"no notebook has a parameter {', '.join(sorted(unknown))}")
    out = HERE if arguments.in_place else arguments.out
    out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # a debugger's warning, no error
    start = time.perf_counter()
    with tqdm(total=len(NOTEBOOKS), bar_format="{desc} [{elapsed}]", file=sys.stdout,
              disable=not sys.stdout.isatty()) as bar:  # fmt: skip
        for number, name in enumerate(NOTEBOOKS, start=1):

            def show(cell, cells, number=number, name=name):
                at = f"notebook {number}/5, {name}.ipynb, cell {cell + 1}/{cells}"
                bar.set_description_str(at)

            try:
                notebook = execute(name, parameters, show)
            except CellExecutionError as error:
                bar.close()
                print(f"error: in {bar.desc}:\n{COLOUR.sub('', str(error))}", file=sys.stderr)
                return 1
            nbformat.write(notebook, out / f"{name}.ipynb")
            bar.update()
    print(f"all five notebooks ran in {time.perf_counter() - start:.0f} s")
    report = Path(HERE, parameters.get("RUN_DIR", "runs/sample"), "report.json")
    print_report(json.loads(report.read_text(encoding="utf-8")), out)
    return 0


def print_report(report, out):
    """The short table at the end; `report` is what 3_Inference wrote."""
    pairs = report.pop("pairs")
    for name, value in (report | {"notebooks": str(out)}).items():
        print(f"  {name:24s} {value:.3f}" if isinstance(value, float) else f"  {name:24s} {value}")
    for pair in pairs:
        print(f"\n  actual     {pair['actual']}\n  predicted  {pair['predicted']}")


if __name__ == "__main__":
    sys.exit(main())
