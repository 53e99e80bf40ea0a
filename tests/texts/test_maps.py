"""The READMEs' equation maps agree with the code, and their links lead to the right lines."""

import ast

import maps
import pytest
from maps import ROOT

MEND = "run `python -m tests.maps --fix` in the root, then correct the rest by hand"
LESSONS = sorted(path.parent.name for path in ROOT.glob("lesson_*/README.md"))


@pytest.mark.parametrize("lesson", LESSONS)
def test_map_and_docstrings_name_the_same_equations(lesson):
    wrong = maps.disagreements(lesson)
    assert not wrong, "\n".join([*wrong, MEND])
    assert len(maps.claims_of_map(lesson)) > 10


def test_links_go_to_the_line_that_defines_the_name():
    wrong = maps.stale_links()
    assert not wrong, "\n".join([*wrong, MEND])


def test_every_row_names_tests_and_each_exists():
    defined = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        defined |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for readme in maps.readmes():
        for equation, links, tests in maps.rows(readme):
            assert links, f"{readme}: {equation} links to nothing"
            assert tests, f"{readme}: {equation} has no test"
            missing = set(tests) - defined
            assert not missing, f"{readme}: {equation} names tests that do not exist: {missing}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Ho20 Eq. 6, 7", ["Ho20 Eq. 6", "Ho20 Eq. 7"]),
        ("Nichol21 Eq. 10-12", [f"Nichol21 Eq. {n}" for n in (10, 11, 12)]),
        ("Song21 Section 4.2, Appendix D.2", ["Song21 Section 4.2", "Song21 Appendix D.2"]),
        ("Ho20 Eq. 1, SD15 Eq. 2", ["Ho20 Eq. 1", "SD15 Eq. 2"]),
        ("Song21 Section 5; as in the code, σ stays", ["Song21 Section 5"]),
        ("Ho20, the code", []),
    ],
)
def test_equations_are_read_from_words(text, said):
    assert list(maps.equations(text)) == said


def test_a_line_that_moved_and_a_key_that_is_missing_are_found(tmp_path, monkeypatch):
    lesson = tmp_path / "lesson_77"
    lesson.mkdir()
    (lesson / "a.py").write_text('def f():\n    """One [Ho20 Eq. 4]."""\n\n\ndef g():\n    pass\n')
    readme = lesson / "README.md"
    readme.write_text(
        "## Equation map\n\n| Ho20 | f | t |\n|---|---|---|\n| Eq. 5 | [`f`](a.py) | |\n"
    )
    monkeypatch.setattr(maps, "ROOT", tmp_path)
    assert maps.disagreements("lesson_77") == [
        "lesson_77/a.py: the docstring of f names Ho20 Eq. 4, the map does not",
        "lesson_77/a.py: the map has Ho20 Eq. 5 at f, whose docstring does not name it",
    ]
    readme.write_text("| [`g`](a.py#L1) | [`f`](a.py#L1) | [`h`](a.py#L3) |\n")
    assert maps.stale_links(fix=True) == [
        "lesson_77/README.md: g is at a.py#L5, the link has line 1",
        "lesson_77/README.md: a.py defines no h",
    ]
    assert readme.read_text() == "| [`g`](a.py#L5) | [`f`](a.py#L1) | [`h`](a.py#L3) |\n"
    assert maps.stale_links() == ["lesson_77/README.md: a.py defines no h"]
