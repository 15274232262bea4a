"""The notebook, run whole in a kernel of its own: it learns, loads back, draws, and stands in git without outputs."""

import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from processes import without_torch

NOTEBOOK = Path(__file__).parents[1] / "examples" / "first_fine_tune.ipynb"
LIMIT = 120  # seconds a cell: what the issue allows the whole on a quiet machine


def test_it_is_kept_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(cells) >= 5
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)


def test_it_runs_whole(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=LIMIT, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=without_torch())
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    before, after = map(float, re.search(r"loss ([\d.]+) before, ([\d.]+) after", text).groups())
    assert after < before - 1
    assert any("image/png" in output.get("data", {}) for output in outputs)
    # What the run says is text, its table too: rich would make outputs of its own of it, which `quiet` cannot silence.
    assert "Adam would keep" in text
    assert "train_loss" in text
    # tqdm, which Hugging Face imports, asks for ipywidgets too, in words of its own.
    assert not any(output.output_type == "error" or 'install "ipywidgets"' in str(output) for output in outputs)
    assert not list(tmp_path.iterdir())
