"""The notebooks run from their first cell to their last, with small settings, and are stored without outputs."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

FOLDER = Path(__file__).parents[1] / "examples" / "notebooks"
# What the cell of settings is followed by.
SMALL = {
    "nerf.ipynb": "steps, views = 60, 16",
    "prompt_to_mesh.ipynb": (
        "steps, looks, last, draws, denoising = 4, 2, 2, 1, 4\nsamples, size = 24, 32\nout = {out!r}"
    ),
}


def read(name: str) -> Any:
    return nbformat.read(FOLDER / name, as_version=4)


def test_all_are_run_here() -> None:
    assert sorted(path.name for path in FOLDER.glob("*.ipynb")) == sorted(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_it_is_stored_without_outputs(name: str) -> None:
    cells = [cell for cell in read(name).cells if cell.cell_type == "code"]
    assert len(cells) >= 4
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_it_runs(name: str, tmp_path: Path) -> None:
    notebook = read(name)
    (settings,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    settings.source += "\n" + SMALL[name].format(out=str(tmp_path / "run"))
    began = time.perf_counter()
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}}).execute()
    print(f"{name}: {time.perf_counter() - began:.1f} s")
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    if name == "nerf.ipynb":
        (quality,) = re.findall(r"PSNR (\d+\.\d+) dB", printed)
        assert float(quality) > 15.5  # 17.9 where it was written; 9.4 without training
        assert len(pictures) == 4
    else:
        assert (tmp_path / "run" / "mesh.glb").read_bytes()[:4] == b"glTF"
        assert "<model-viewer" in (tmp_path / "run" / "view.html").read_text(encoding="utf-8")
        assert printed.count("step ") == 2
        assert len(pictures) == 1 + 2 + 1
