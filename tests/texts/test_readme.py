"""The READMEs' promises: commands that run, links and pictures that exist, formulas that GitHub can
render, and numbers that were measured."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.quality import figures, scoreboard
from benchmarks.records import read_json

import pytest
from helpers import ROOT
from PIL import Image

FOLDERS = [p for p in ROOT.glob("*") if p.is_dir() and p.name[0] != "." and p.name != "data"]
READMES = [
    ROOT / "README.md",
    ROOT / "GLOSSARY.md",
    *sorted(
        p for f in FOLDERS for p in f.rglob("README.md") if "output" not in p.relative_to(f).parts
    ),
]
NAMES = [str(r.relative_to(ROOT)) for r in READMES]
TINY = {
    "train_mnist.py": "--dataset digits --network.channels 8 --network.num_groups 1 "
    "--num_samples 1 --num_training_steps 2 --num_timesteps 60 --batch_size 4 --num_previews 1 "
    "--device cpu",
    "sample_mnist.py": "--num_samples 1 --device cpu",
    "sample_ddim.py": "--num_samples 1 --num_steps 2 --device cpu",
    "interpolate.py": "--dataset digits --times 2 5 --num_columns 2 --device cpu",
    "break_it.py": "--num_samples 1 --num_training_steps 1 --device cpu",
    "toy.py": "--num_timesteps 25 --num_training_steps 2 --num_points 8",
    "which_t.py": "--early_steps 1 --num_steps 2 --num_samples 2 --metrics false "
    "--dataset digits --device cpu",
}


def commands(readme: Path) -> list[str]:
    """The command lines of a README: in bash blocks, or indented and starting with python or
    make."""
    text = readme.read_text()
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    indented = "\n".join(re.findall(r"^    ((?:python|make) .*)$", text, re.MULTILINE))
    lines = [line.split("#")[0].strip() for line in (blocks + "\n" + indented).splitlines()]
    return [line for line in lines if line]


def scripts(readme: Path) -> list[str]:
    """The command lines of a README that run a script."""
    return [line for line in commands(readme) if re.match(r"python \S+\.py\b", line)]


def test_the_root_readme_shows_the_two_commands():
    lines = commands(ROOT / "README.md")
    assert "make train" in lines
    assert "make test" in lines
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_every_make_target_exists():
    for readme in READMES:
        for line in commands(readme):
            if line.startswith("make "):
                subprocess.run([*line.split(), "-n"], cwd=ROOT, check=True, capture_output=True)


LESSON_5 = [ROOT / name / "README.md" for name in (".", "common", "lesson_05")]
SCRIPTS = [(r, line) for r in LESSON_5 for line in scripts(r)]


@pytest.mark.parametrize(("readme", "line"), SCRIPTS, ids=[line for _, line in SCRIPTS])
def test_every_command_of_the_readme_runs(readme, line, trained, tmp_path, monkeypatch, capsys):
    """In its folder; the first in a separate process, as a user would run it."""
    words = shlex.split(line)[1:]
    folders = (readme.parent, ROOT, ROOT / "lesson_05")
    folder = next(folder for folder in folders if (folder / words[0]).exists())
    if "--data_dir" in words:  # a folder of one's own images
        words[words.index("--data_dir") + 1] = str(tmp_path / "photos")
        (tmp_path / "photos").mkdir()
        for number in range(6):
            Image.effect_noise((60, 40), number).save(tmp_path / "photos" / f"{number}.jpg")
    elif "--dataset" in words:  # the only data that need no download
        words[words.index("--dataset") + 1] = "digits"
    if "--model_checkpoint" in words:
        words[words.index("--model_checkpoint") + 1] = str(
            trained / "checkpoint_000004.safetensors"
        )
    elif "train" not in words[0] and words[0] != "toy.py":
        words += ["--model_checkpoint", str(trained / "checkpoint_000004.safetensors")]
    tiny = TINY[Path(words[0]).name]
    tiny = tiny.replace("--dataset digits ", "") if "--data_dir" in words else tiny
    if "--start_from" in words:  # the shipped network has the preset's size
        tiny = re.sub(r"--network\.\w+ \d+ ", "", tiny)
    words += [*shlex.split(tiny), "--output_dir", str(tmp_path / "run")]
    if (readme, line) == SCRIPTS[0]:
        result = subprocess.run(
            [sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stderr
    else:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", words)
        runpy.run_path(words[0], run_name="__main__")
    assert list((tmp_path / "run").glob("*.png"))


@pytest.mark.parametrize("readme", READMES, ids=NAMES)
def test_checks_of_the_exercises_run(readme, capsys):
    for line in commands(readme):
        if line.startswith("python -c "):
            _, _, code, *rest = shlex.split(line)
            assert not rest, line
            exec(compile(code, line, "exec"), {"__name__": "__main__"})
            assert capsys.readouterr().out.strip(), f"prints nothing: {line}"


def unfolded(readme: Path) -> str:
    """Without the answers of the exercises, which tests of the lessons run."""
    return re.sub(r"<details>.*?</details>", "", readme.read_text(), flags=re.DOTALL)


PYTHON = [
    (readme, block)
    for readme in READMES
    for block in re.findall(r"```python\n(.*?)```", unfolded(readme), re.DOTALL)
]


@pytest.mark.parametrize(("readme", "block"), PYTHON)
def test_python_of_the_readmes_runs(readme, block, monkeypatch, tmp_path):
    """In the root, or beside a checkpoint that is named without a folder. Images are as their
    comment says, and finite."""
    folder = readme.parent if readme.parent.name == "pretrained" else ROOT
    for source in ("lesson_02", "lesson_05", "lesson_06", "lesson_09"):
        if folder == ROOT:
            (tmp_path / source).symlink_to(ROOT / source)
    monkeypatch.chdir(tmp_path if folder == ROOT else folder)
    names: dict[str, Any] = {}
    exec(compile(block, str(readme), "exec"), names)
    for name in {"images", "samples", "noise", "x0"} & names.keys():
        assert names[name].isfinite().all(), name
        shape = re.search(rf"{name}.*  # .*\((\d+, \d+, \d+, \d+)\)", block)
        assert shape is None or shape[1] == str(tuple(names[name].shape))[1:-1]
    if "safe_open" in block:
        assert "ema.conv_in.weight" in names["weights"]


def test_lessons_show_their_use_from_python():
    with_python = {str(readme.parent.relative_to(ROOT)) for readme, _ in PYTHON}
    assert with_python >= {".", "lesson_02", "lesson_05", "lesson_06", "lesson_09"}


@pytest.mark.parametrize("readme", READMES, ids=NAMES)
def test_files_that_are_compared_exist(readme):
    for line in commands(readme):
        if line.startswith("diff "):
            for name in line.split()[2:]:
                assert (readme.parent / name).is_file(), line


def test_every_lesson_has_its_parts():
    parts = ["The question", "Run it", "Notation", "Equation map", "What changed since"]
    parts += ["Three things to break", "Exercises", "Differs", "Further reading"]
    for readme in READMES:
        text = readme.read_text()
        if "## Equation map" in text:
            assert [part for part in parts if part not in text] == [], readme
            section = text.split("## Exercises")[1].split("\n## ")[0]
            exercises = re.split(r"^\d\. ", section, flags=re.MULTILINE)[1:]
            assert len(exercises) >= 5, readme
            for exercise in exercises:
                assert "Check" in exercise, f"{readme}: an exercise without a check: {exercise}"


def test_a_mistake_on_the_real_command_line_is_one_line_and_exit_code_2(tmp_path):
    words = ["train_mnist.py", "--batch_size", "0", "--dataset", "digits", "--output_dir"]
    result = subprocess.run(
        [sys.executable, *words, str(tmp_path)],
        cwd=ROOT / "lesson_05",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2
    assert result.stderr.strip() == ("error: batch_size is 0: it must be at least 1")


@pytest.mark.parametrize("readme", READMES, ids=NAMES)
def test_linked_files_and_named_tests_exist(readme):
    text = readme.read_text()
    links = re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", text)
    links += [(source, "") for source in re.findall(r'src="([^"]+)"', text)]
    for link, place in links:
        if link.startswith("http"):
            continue
        target = readme.parent / link if link else readme
        assert target.exists(), link
        if place and target.suffix == ".md":
            assert place in anchors(target), f"{link}#{place}"
    tests = "".join(path.read_text() for path in ROOT.glob("tests/**/*.py"))
    for name in re.findall(r"(?:`|-k )(test_\w+)`", text):
        assert f"def {name}(" in tests, name


def anchors(readme: Path) -> list[str]:
    """The names of its headings in GitHub's links."""
    headings = re.findall(r"^#+ (.*)$", readme.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("readme", READMES, ids=NAMES)
def test_mathematics_survives_markdown(readme):
    """In $...$ GitHub's Markdown drops a backslash before punctuation and may read }_ as emphasis;
    both are safe in ```math blocks. It refuses some macros."""
    text = readme.read_text()
    assert "operatorname" not in text
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    assert "$$" not in prose, "write displayed mathematics as a ```math block"
    for formula in re.findall(r"\$([^$]+)\$", prose):
        assert "\n" not in formula, f"broken over two lines: {formula}"
        assert not re.search(r"\\[^\w\s]", formula), f"backslash and punctuation: {formula}"
        assert not re.search(r"[}\])]_\w|\*", formula), f"read as emphasis: {formula}"
    for formula in re.findall(r"```math\n(.*?)```", text, re.DOTALL):
        assert formula.count("{") == formula.count("}"), formula


def test_each_lesson_shows_samples_of_the_scoreboard():
    text = (ROOT / "README.md").read_text().split("## The lessons")[1].split("\n## ")[0]
    rows = [line for line in text.splitlines() if "README.md)" in line and line.startswith("|")]
    results = read_json(scoreboard.STORED / "results.json")
    assert len(rows) == 6
    for row in rows:
        assert re.search(r"scoreboard/(\w+)\.png", row)[1] in results, row


def test_the_sizes_of_the_networks_in_the_readme_are_those_of_the_scoreboard():
    results = read_json(scoreboard.STORED / "results.json")
    text = " ".join((ROOT / "README.md").read_text().split())
    sizes = [
        (f"{results[row]['parameters'] / 1e6:.2f} M", f"{results[row]['training_steps']:,}")
        for row in ("text", "classes")
    ]
    (size, steps), (other_size, other_steps) = sizes
    assert f"has {size} parameters and was trained for {steps} steps" in text
    assert f"the one with labels has {other_size} and was trained for {other_steps}." in text


def test_the_glossary_has_a_line_of_code_and_a_lesson_for_each_term():
    _, *entries = re.split(r"^### ", (ROOT / "GLOSSARY.md").read_text(), flags=re.MULTILINE)
    assert 20 <= len(entries) <= 25
    terms = [entry.splitlines()[0] for entry in entries]
    assert terms == sorted(terms, key=str.lower)
    for entry in entries:
        assert re.search(r"Code: \[`[\w.]+`\]\([\w/]+\.py#L\d+\)", entry), entry
        assert re.search(r"\]\(lesson_\d\d/[\w/]*README\.md\)", entry), entry
        assert len(entry.split("Code: ")[0].split()) < 80, f"too long: {entry}"


def test_the_numbers_in_the_benchmarks_readme_were_measured():
    """Its ratios, fractions and tables are those of benchmarks/results."""
    folder = ROOT / "benchmarks" / "results"
    bench, laptop, race = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("bench", "laptop", "race")
    )
    text = (ROOT / "benchmarks" / "README.md").read_text()
    prose = " ".join(text.split())
    rows = {
        "the paper's network, a step of training": bench["training"],
        "the paper's network, a step of sampling": bench["sampling"],
        "the laptop preset's network, a step of training": laptop["training"],
        "the laptop preset's network, a step of sampling": laptop["sampling"],
        "the same, 64 samples of DDIM in 50 steps": bench["whole"]["DDIM, 50 steps"],
        "the same, 64 samples of DDPM in 1000 steps": bench["whole"]["DDPM, 1000 steps"],
    }
    for name, measured in rows.items():
        cells = [
            f"{measured['ratio'][key]:.2f}" if key in measured["ratio"] else ""
            for key in ("diffusers, best", "denoising-diffusion-pytorch, best")
        ]
        assert f"| {name} | {cells[0]} | {cells[1]} |".replace("|  |", "| |") in text
    attention = json.loads((folder / "attention.json").read_text())["attention"]
    small, large = (times["fused"] / times["written out"] for times in attention.values())
    assert f"takes {small:.1f} times as long on this CPU in the laptop preset" in prose
    assert f"{large:.1f} times in the paper's, forward and backward" in prose
    trained = bench["training"]
    assert f"{trained['spent_on']['convolutions']:.0%} of its training step" in prose
    assert f"reach {trained['convolutions_share_of_peak']:.0%} of the speed" in prose
    assert f"would be {trained['ratio_of_convolutions']:.2f} times as quick" in prose
    for name in ("before", "race"):
        table = (folder / f"{name}.md").read_text()
        assert all(line in text for line in table.splitlines() if line.startswith("|")), name
    assert f"commit {race['commit'][:7]}" in prose


@pytest.mark.parametrize("lesson", list(figures.RECIPES))
def test_pictures_are_those_of_make_figures(lesson):
    """Each picture of a README is made by `make figures` from the current checkpoint."""
    source, recipes = figures.RECIPES[lesson]
    folder = ROOT / lesson / "figures"
    made = {name for recipe in recipes for name in recipe.files.values()}
    made_from = (folder / "made_from.txt").read_text()
    assert made_from == figures.made_from(source), (
        f"{source} is not what {lesson}/figures were made from: "
        f"python -m benchmarks.quality.figures --lessons {lesson}"
    )
    assert {path.name for path in folder.iterdir()} == made | {"made_from.txt"}
    for path in folder.iterdir():
        assert 0 < path.stat().st_size < 300_000, path


def test_no_readme_shows_another_picture():
    made = {
        os.path.realpath(ROOT / lesson / "figures" / name)
        for lesson, (_, recipes) in figures.RECIPES.items()
        for recipe in recipes
        for name in recipe.files.values()
    }
    shown = [*scoreboard.STRIPS, "fid"]
    made |= {os.path.realpath(scoreboard.STORED / f"{name}.png") for name in shown}
    made.add(os.path.realpath(ROOT / "benchmarks" / "results" / "race.png"))
    made.add(os.path.realpath(ROOT / "lesson_06" / "demo" / "screenshot.png"))
    for readme in READMES:
        for link in re.findall(r'!\[[^\]]*\]\(([^)]+)\)|src="([^"]+)"', readme.read_text()):
            link = "".join(link)
            assert os.path.realpath(readme.parent / link) in made, f"{readme}: {link}"
