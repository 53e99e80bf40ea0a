"""What the READMEs promise: their commands run, their links and the tests they name exist."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

READMES = sorted(p for p in ROOT.glob("**/README.md") if ".venv" not in p.parts)
TINY = {
    "train_mnist.py": "--dataset digits --network.channels 8 --network.num_groups 1 "
    "--num_samples 1 --num_training_steps 2 --num_timesteps 60 --batch_size 4 --num_previews 1 "
    "--device cpu",
    "sample_mnist.py": "--num_samples 1 --device cpu",
    "interpolate.py": "--dataset digits --times 2 5 --num_columns 2 --device cpu",
}


def commands(readme: Path) -> list[str]:
    """Its command lines: in bash blocks, and indented ones that begin with python or make."""
    text = readme.read_text()
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    indented = "\n".join(re.findall(r"^    ((?:python|make) .*)$", text, re.MULTILINE))
    lines = [line.split("#")[0].strip() for line in (blocks + "\n" + indented).splitlines()]
    return [line for line in lines if line]


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


LESSON_5 = [ROOT / "README.md", ROOT / "lesson_05" / "README.md"]
SCRIPTS = [(r, line) for r in LESSON_5 for line in commands(r) if ".py" in line]


@pytest.mark.parametrize(("readme", "line"), SCRIPTS, ids=[line for _, line in SCRIPTS])
def test_every_command_of_the_readme_runs(readme, line, trained, tmp_path):
    words = shlex.split(line)
    assert words[0] == "python"
    script = words[1]
    folder = readme.parent if (readme.parent / script).exists() else ROOT / "lesson_05"
    if "--dataset" in words:  # only digits are at hand everywhere
        words[words.index("--dataset") + 1] = "digits"
    if "--model_checkpoint" in words:
        words[words.index("--model_checkpoint") + 1] = str(trained / "checkpoint_000004.pt")
    elif "train" not in script:
        words += ["--model_checkpoint", str(trained / "checkpoint_000004.pt")]
    words += [*shlex.split(TINY[Path(script).name]), "--output_dir", str(tmp_path / "run")]
    result = subprocess.run(
        [sys.executable, *words[1:]], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "run").glob("*.png"))


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
    assert result.stderr.strip() == (
        "error: batch_size is 0: it must be from 1 to 1,500, the number of training images"
    )


@pytest.mark.parametrize("readme", READMES, ids=[str(r.relative_to(ROOT)) for r in READMES])
def test_links_and_tests_named_exist(readme):
    text = readme.read_text()
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not link.startswith("http"):
            assert (readme.parent / link).exists(), link
    tests = "".join(path.read_text() for path in ROOT.glob("tests/*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, name
