"""Exercises: each blank must fail its check, each folded answer of the README must pass it, and
each wrong answer that a lesson's test names must fail."""

import re
from importlib import import_module
from types import ModuleType

from common.exercises import verdict

from helpers import ROOT


def fresh(lesson: str) -> ModuleType:
    """A new copy of LESSON/exercises.py, with its blanks. LESSON is a folder."""
    module = import_module(f"{lesson}.exercises".replace("/", "."))
    copy = ModuleType(module.__name__)
    copy.__file__ = module.__file__
    source = (ROOT / lesson / "exercises.py").read_text(encoding="utf-8")
    exec(compile(source, str(module.__file__), "exec"), copy.__dict__)
    return copy


def answers(lesson: str) -> list[str]:
    """The Python blocks inside <details> in the README's section Exercises, in order."""
    text = (ROOT / lesson / "README.md").read_text(encoding="utf-8")
    section = text.split("\n## Exercises\n")[1].split("\n## ")[0]
    folded = re.findall(r"<details>(.*?)</details>", section, re.DOTALL)
    blocks = [re.findall(r"```python\n(.*?)```", part, re.DOTALL) for part in folded]
    assert all(len(found) == 1 for found in blocks), "one block of Python in each answer"
    lines = [block.splitlines() for (block,) in blocks]
    indents = [min(len(x) - len(x.lstrip()) for x in rows if x.strip()) for rows in lines]
    return ["\n".join(x[n:] for x in rows) for rows, n in zip(lines, indents, strict=True)]


def checks(module: ModuleType) -> list[str]:
    return sorted(name for name in vars(module) if re.match(r"check_\d+_", name))


def verdicts(lesson: str, *code: str) -> dict[str, str]:
    """check name -> verdict, after that code was put in place of the blanks."""
    module = fresh(lesson)
    for block in code:
        exec(block, module.__dict__)
    return {name: verdict(getattr(module, name)) for name in checks(module)}


def assert_exercises_hold(lesson: str, wrong: dict[str, list[str]]) -> None:
    """Blanks fail, answers pass, and wrong answers (check name -> code) fail."""
    blank = verdicts(lesson)
    assert len(blank) >= 5
    assert not [name for name, text in blank.items() if text == "right"]
    solutions = answers(lesson)
    assert len(solutions) == len(blank)
    right = verdicts(lesson, *solutions)
    assert set(right.values()) == {"right"}, right
    assert wrong.keys() == blank.keys(), "name a wrong answer for every check"
    for name, blocks in wrong.items():
        for block in blocks:
            assert verdicts(lesson, *solutions, block)[name] != "right", block
