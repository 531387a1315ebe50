"""Every tutorial runs from its first cell to its last, in its toy setting, from an empty folder."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTSUITE_TOY", "1")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=420, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [o for o in outputs if o.output_type == "error"]
    assert any("image/jpeg" in o.get("data", {}) for o in outputs), "no picture was drawn"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_is_small_and_tells_no_folder_of_its_maker(path):
    text = path.read_text(encoding="utf-8")
    assert len(text) < 400_000
    for word in ("/home/", "/root/", "/work/", "/Users/", "site-packages"):
        assert word not in text, word


def test_there_are_notebooks():
    assert NOTEBOOKS
