"""How a command ends, and the documentation of every script's flags."""

import importlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from common import cli
from common.errors import UserError

import pytest
from helpers import ROOT, error_line
from tqdm import tqdm


def failing(error: str = "user") -> None:
    """Fail.

    Args:
        error: how.
    """
    if error == "interrupt":
        raise KeyboardInterrupt
    if error == "memory":
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
    raise {"user": UserError("é\nno"), "file": FileNotFoundError(2, "Not found", "x.png")}[error]


def test_errors_have_one_line_and_an_exit_code(capsys, monkeypatch):
    assert error_line(capsys, failing) == "error: é no"
    assert error_line(capsys, failing, "--error", "file") == "error: [Errno 2] Not found: 'x.png'"
    assert "error: out of memory: try" in error_line(capsys, failing, "--error", "memory")
    with pytest.raises(SystemExit) as stopped:
        cli.run(failing, ["--error", "interrupt"])
    line = "stopped: the same command starts again\n"
    assert (stopped.value.code, capsys.readouterr().err) == (130, line)


def test_errors_name_the_torchrun_process(capsys, monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "2", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        cli.run(failing, [])
    assert capsys.readouterr().err == "process 2: error: é no\n"


def talking(folder: str) -> None:
    """Print all along.

    Args:
        folder: for the result.
    """
    for _ in tqdm(range(3)):
        print("η" * 9000)
        tqdm.write("η", file=sys.stderr)
    (Path(folder) / "result").touch()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("closing", ["", ">&-", "2>&-", ">&- 2>&-", "> /dev/full", "2> /dev/full"])
def test_no_output_can_end_a_run(closing, tmp_path):
    """As a shell closes the streams, or with a full disk, and with few letters."""
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests' / 'common')!r}]\n"
    code += "import test_cli_ending as test; from common import cli\n"
    code += f"cli.run(test.talking, ['--folder', {str(tmp_path)!r}])"
    words = shlex.join([sys.executable, "-c", code])
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "PYTHONIOENCODING": "cp1251"}
    done = subprocess.run(f"{words} {closing}", shell=True, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert (tmp_path / "result").exists()
    assert (tmp_path / "result").read_bytes() == b""


@pytest.mark.parametrize("kind", ["none", "ascii", "closed", "full"])
def test_unusable_streams_give_no_traceback(kind, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True) if kind != "none" else None
    if kind == "closed":
        stream.close()
    if kind == "full":
        if not Path("/dev/full").exists():
            pytest.skip("no /dev/full here")
        stream = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    monkeypatch.setattr(sys, "stderr", stream)
    with pytest.raises(SystemExit) as stopped:
        cli.run(failing, [])
    assert stopped.value.code == 2
    if kind == "ascii":
        assert stream.buffer.getvalue() == b"error: \\xe9 no\n"


def test_every_script_documents_its_flags(capsys):
    paths = [*ROOT.glob("lesson_*/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]
    calls = {path: re.search(r"cli\.run\(main(.*)\)", path.read_text()) for path in paths}
    scripts = {path: call[1] for path, call in calls.items() if call}
    assert len(scripts) > 15
    for path, words in scripts.items():
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        module = importlib.import_module(name)
        groups = {k: getattr(module, v) for k, v in re.findall(r"(\w+)=(?!True)(\w+)", words)}
        assert all(action.help for action in cli.Parser(module.main, groups)._actions), name
        with pytest.raises(SystemExit):
            cli.run(module.main, ["--help"], presets="presets" in words, **groups)
