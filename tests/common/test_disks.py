"""A full, missing or read-only disk ends a run with one line, and saved files stay intact."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

from common import checkpoint
from common.checkpoint import saved
from common.errors import UserError

import pytest
from toy import toy_run


def stopped_by(folder: Path, harm: Callable[[Path], None]) -> str:
    """The error line of a run whose folder is damaged in its second step."""

    def harm_at_2(step: int) -> None:
        if step == 2:
            harm(folder)

    with pytest.raises(UserError) as stopped:
        toy_run(folder, on_step=harm_at_2, checkpoint_every=1)
    return str(stopped.value)


def test_a_quota_exceeded_while_saving(tmp_path):
    resource = pytest.importorskip("resource", reason="no quotas here")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        line = stopped_by(
            tmp_path / "run",
            lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1])),
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "checkpoint_000002.safetensors could not be written (" in line
    assert "File too large" in line
    assert checkpoint.load(tmp_path / "run" / "checkpoint_000001.safetensors").step == 1
    assert not list((tmp_path / "run").glob(".*.part"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_under_the_log_does_not_end_the_run(tmp_path, capsys):
    toy_run(
        tmp_path,
        steps=6,
        log_every=3,
        on_step=lambda step: step == 2 and (tmp_path / "metrics.csv").symlink_to("/dev/full"),
    )
    assert capsys.readouterr().out.count("metrics.csv could not be written (No space left") == 2
    assert saved(tmp_path)[-1].name == "checkpoint_000006.safetensors"


def test_a_folder_that_goes_away(tmp_path):
    line = stopped_by(tmp_path / "run", lambda run: run.rename(run.with_name("moved")))
    assert "could not be written (No such file or directory)" in line
    assert checkpoint.load(tmp_path / "moved" / "checkpoint_000001.safetensors").step == 1


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere"
)
def test_a_folder_that_becomes_read_only(tmp_path):
    line = stopped_by(tmp_path / "run", lambda run: run.chmod(0o500))
    (tmp_path / "run").chmod(0o700)
    assert "could not be written (Permission denied)" in line
