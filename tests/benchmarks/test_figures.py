"""The recipes of the READMEs' pictures."""

import importlib
import shlex

from benchmarks.quality import figures
from common import cli

import pytest
from helpers import ROOT, error_line

COMMANDS = [recipe.command for _, recipes in figures.RECIPES.values() for recipe in recipes]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.split()[0] not in figures.MORE])
def test_the_script_of_a_recipe_has_its_flags(command, capsys):
    module, *words = shlex.split(command)
    words += ["--output_dir", "x", "--print_config"]
    with pytest.raises(SystemExit) as stopped:
        cli.run(importlib.import_module(module).main, words)
    assert stopped.value.code in (0, None)
    assert "seed: 0" in capsys.readouterr().out


def test_the_curves_and_the_noise_of_a_lesson_are_drawn(real_mnist, tmp_path):
    recipes = [recipe for _, recipes in figures.RECIPES.values() for recipe in recipes]
    for recipe in (r for r in recipes if r.command.split()[0] in figures.MORE):
        figures.run(recipe.command, tmp_path)
        assert all((tmp_path / file).stat().st_size > 0 for file in recipe.files)


def test_pictures_are_stored_with_the_checksum_of_their_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "run", lambda command, folder: (folder / "a.png").touch())
    source = "lesson_05/pretrained/mnist.safetensors"
    recipe = figures.Recipe("lesson_05.sample_mnist", {"a.png": "b.png"})
    monkeypatch.setitem(figures.RECIPES, "lesson_05", (source, [recipe]))
    figures.make("lesson_05", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"b.png", "made_from.txt"}
    made_from = (ROOT / "lesson_05" / "figures" / "made_from.txt").read_text()
    assert (tmp_path / "made_from.txt").read_text() == made_from


def test_a_lesson_without_pictures_is_refused(capsys):
    error = error_line(capsys, figures.main, "--lessons", "lesson_07")
    assert "lesson_07 has no pictures: choose from lesson_02" in error
