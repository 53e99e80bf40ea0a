"""The notebooks run from top to bottom, and are stored with their outputs."""

import ast
import json
import os
from pathlib import Path

import maps
import nbclient
import nbformat
import pytest
from helpers import ROOT

NOTEBOOKS = sorted(ROOT.glob("lesson_*/walkthrough.ipynb"))
NAMES = [path.parent.name for path in NOTEBOOKS]


def code(notebook: Path) -> list[dict]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=NAMES)
def test_notebook_runs(notebook, monkeypatch, capsys):
    """All cells in order, with a few steps of everything."""
    monkeypatch.setenv("DIFFUSION_TINY", "1")
    monkeypatch.chdir(notebook.parent)
    names: dict[str, object] = {"__name__": "__main__"}
    for number, cell in enumerate(code(notebook), 1):
        source = "".join(cell["source"])
        exec(compile(source, f"{notebook.parent.name}, cell {number}", "exec"), names)


def test_a_notebook_runs_in_a_kernel(monkeypatch):
    """As `make notebooks` runs them all."""
    monkeypatch.setenv("DIFFUSION_TINY", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    content = nbformat.read(NOTEBOOKS[-1], as_version=4)
    folder = str(NOTEBOOKS[-1].parent)
    client = nbclient.NotebookClient(content, timeout=300, resources={"metadata": {"path": folder}})
    client.execute()
    outputs = [output for cell in content.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 6


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=NAMES)
def test_notebook_is_stored_with_its_outputs(notebook):
    cells = code(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert os.path.getsize(notebook) < 700_000
    assert "/tmp/" not in notebook.read_text(encoding="utf-8"), "a path of the machine that ran it"
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 6
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=NAMES)
def test_notebook_compares_what_it_writes_out_with_the_lesson(notebook):
    """It defines no classes. A function that it writes out under a name of the lesson is called
    beside the lesson's, as in process.q_sample, and compared by assert_close in the same cell."""
    lesson = {
        name.rpartition(".")[2]
        for path in notebook.parent.glob("*.py")
        for name in maps.definitions(path)
        if path.name not in ("break_it.py", "laboratory.py")
    }
    assert len(lesson) > 10
    for cell in code(notebook):
        tree = ast.parse("".join(cell["source"]))
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        written = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)} & lesson
        for name in written:
            called = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
            assert {name, "torch.testing.assert_close"} <= called, name
            assert any(function.endswith(f".{name}") for function in called), name
