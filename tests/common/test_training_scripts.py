"""The training scripts stay short, and what they share stays in common/."""

import ast
from itertools import combinations

import pytest
from helpers import ROOT

LESSONS = ("lesson_02", "lesson_05", "lesson_09")
CONDITIONAL = ("lesson_05/class_conditional", "lesson_05/text_to_image")
SCRIPTS = {name: ROOT / name / "train_mnist.py" for name in (*LESSONS, *CONDITIONAL, "lesson_06")}


def statements(name: str) -> set[str]:
    """The lines of a script, without imports, docstrings and blank lines."""
    text = SCRIPTS[name].read_text()
    tree = ast.parse(text)
    skipped = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    numbers = {n for node in skipped for n in range(node.lineno, node.end_lineno + 1)}
    lines = enumerate(text.splitlines(), 1)
    return {line.strip() for n, line in lines if line.strip() and n not in numbers}


def test_scripts_are_short():
    assert sum(len(path.read_text().splitlines()) for path in SCRIPTS.values()) <= 600


@pytest.mark.parametrize("name", [*LESSONS, *CONDITIONAL])
def test_the_loop_begins_early(name):
    lines = SCRIPTS[name].read_text().splitlines()
    assert next(k for k, line in enumerate(lines, 1) if "in run.steps()" in line) <= 65


def test_scripts_share_no_more_than_the_loop():
    """Lines that all five scripts with a loop share, and lines that any two lessons' scripts
    share."""
    everywhere = set.intersection(*(statements(name) for name in (*LESSONS, *CONDITIONAL)))
    assert len(everywhere) <= 24, sorted(everywhere)
    for one, other in combinations(LESSONS, 2):
        shared = statements(one) & statements(other)
        assert len(shared) <= 44, (one, other, sorted(shared))


def test_the_loss_is_four_calls_from_the_command():
    """cli.run, main, (text to image: train,) process.loss: no other function calls the loss."""
    for name in (*LESSONS, *CONDITIONAL):
        tree = ast.parse(SCRIPTS[name].read_text())
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        calling = [f.name for f in functions if "in run.steps()" in ast.unparse(f)]
        assert calling == (["train"] if "text" in name else ["main"])
        (loop,) = [f for f in functions if f.name == calling[0]]
        names = {node.attr for node in ast.walk(loop) if isinstance(node, ast.Attribute)}
        assert names & {"loss", "loss_terms", "vlb_term"}, name
