"""Every notebook runs from top to bottom on the CPU; what it claims, it asserts itself."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def test_there_are_notebooks():
    assert "losses_by_hand.ipynb" in [path.name for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_starts_in_a_bare_runtime_and_is_stored_without_outputs(path):
    first, *others = code_cells(path)
    assert "except ImportError" in first.source and "pip install" in first.source
    assert "github.com" in first.source and not any("pip install" in cell.source for cell in others)
    assert all(cell.outputs == [] and cell.execution_count is None for cell in (first, *others))
    assert any("assert" in cell.source for cell in others)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # they train: quick code takes longer than quick compilation gains
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.chdir(tmp_path)  # what a notebook writes stays out of the source tree
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, kernel_name="python3", timeout=600).execute()
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
