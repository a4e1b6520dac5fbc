"""Runs notebooks as they are committed: `python -m tools.execute notebooks/03_denoising_loop.ipynb`.

From top to bottom on the CPU profile, with no network, no widget state and no timings in the file. A
notebook is written only once all of it has run.
"""

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

PROFILE = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
CELL_SECONDS = 300
LARGE = 120_000  # characters; a PNG above that gives way to the JPEG, which keeps labels a little less sharp


def execute(path: Path) -> float:
    """Run the notebook in its own folder and write it back; the seconds that it took."""
    notebook = nbformat.read(path, as_version=4)
    start = time.perf_counter()
    NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        store_widget_state=False,
        record_timing=False,
    ).execute()
    seconds = time.perf_counter() - start
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if {"image/png", "image/jpeg"} <= data.keys():  # PIL pictures come in both
                data.pop("image/png" if len(data["image/png"]) > LARGE else "image/jpeg")
    nbformat.validate(notebook)
    temporary = path.with_suffix(".part")
    nbformat.write(notebook, temporary)
    temporary.replace(path)
    return seconds


def main(arguments: list[str]) -> int:
    if not arguments:
        print("Name the notebooks: python -m tools.execute notebooks/*.ipynb", file=sys.stderr)
        return 2
    os.environ.update(PROFILE)  # the kernel inherits them
    for path in map(Path, arguments):
        try:
            print(f"{path.name}: {execute(path):.0f} s")
        except CellExecutionError as error:
            print(f"{path.name} was left as it is, a cell failed:\n{error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
