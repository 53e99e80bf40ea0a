"""Files and folders: atomic writes, output folders, locks, rows of CSV, checksums, downloads."""

import contextlib
import hashlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from common import files
from common.errors import UserError, check_above, check_at_least, one_line

import pytest
from helpers import ROOT
from server import SLOW, Server


class Killed(BaseException):
    """Simulates a kill: no exception handler catches it."""


def killing(function: Callable, moment: int) -> Callable:
    """The function, but its call number `moment`, counted from 0, is a kill."""
    calls = iter(range(9))

    def called(*arguments: object) -> object:
        if next(calls) == moment:
            raise Killed
        return function(*arguments)

    return called


# Writing


@pytest.mark.parametrize(
    ("function", "moment", "content"),
    [("fsync", 0, b"old"), ("replace", 0, b"old"), ("fsync", 1, b"new"), ("fsync", 2, b"new")],
)
def test_a_write_that_is_cut_off_leaves_the_old_file_or_the_new_one(
    tmp_path, monkeypatch, function, moment, content
):
    """Killed before the file is flushed, before it is renamed, before its folder is flushed, and
    not at all."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, function, killing(getattr(os, function), moment))
    ended = False
    try:
        files.write_atomically(path, b"new")
        ended = True
    except Killed:
        pass
    assert ended == (moment == 2)
    assert path.read_bytes() == content
    files.remove_unfinished(tmp_path, "file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_only_unfinished_files_of_that_name_are_removed(tmp_path):
    for name in (".metrics.csv.12.part", ".notes.txt.12.part", "metrics.csv", ".part"):
        (tmp_path / name).mkdir()
    (tmp_path / ".metrics.csv.12.part" / "metrics.csv").touch()
    files.remove_unfinished(tmp_path, "metrics.csv")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {".notes.txt.12.part", "metrics.csv", ".part"}


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"file could not be written \(No space left on device\)"):
        files.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_disk_quota_leaves_the_old_file(tmp_path):
    resource = pytest.importorskip("resource", reason="no quotas here")
    path = tmp_path / "file"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        with pytest.raises(UserError, match="File too large"):
            files.write_atomically(path, bytes(60_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# Folders


def test_output_goes_to_the_lesson_unless_a_folder_is_given(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(files, "make_folder", made.append)
    monkeypatch.setenv("HOME", str(tmp_path))
    default = files.output_folder(None, "lesson_05.text_to_image")
    assert default == ROOT / "lesson_05" / "text_to_image" / "output"
    assert files.output_folder("here", "lesson_05") == Path("here")
    assert files.output_folder("~/pictures", "lesson_05") == tmp_path / "pictures"
    assert made == [default, Path("here"), tmp_path / "pictures"]
    with pytest.raises(UserError, match="--output_dir is empty"):
        files.output_folder("", "lesson_05")
    with pytest.raises(UserError, match="~nosuchuser/x"):
        files.output_folder("~nosuchuser/x", "lesson_05")


def test_a_folder_is_made_and_checked(tmp_path, monkeypatch):
    files.make_folder(tmp_path / "a" / "b")
    assert not list((tmp_path / "a" / "b").iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        files.make_folder(tmp_path / "file" / "run")

    def read_only(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", read_only)
    with pytest.raises(UserError, match=r"cannot be written \(Permission denied\): name another"):
        files.make_folder(tmp_path / "a")


def test_one_folder_has_one_lock(tmp_path):
    """Also across processes; a process that was killed holds no lock."""
    lock = files.lock_folder(tmp_path)
    with pytest.raises(UserError, match="another run is writing into"):
        files.lock_folder(tmp_path)
    lock.release()
    code = "import sys, pathlib; from common import files\n"
    code += "lock = files.lock_folder(pathlib.Path(sys.argv[1]))\n"
    code += "print('locked', flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match="another run is writing into"):
        files.lock_folder(tmp_path)
    other.kill()
    other.wait()
    files.lock_folder(tmp_path).release()


def test_a_drive_without_locks_is_reported(tmp_path, monkeypatch, capsys):
    def no_locks(*_: object, **__: object) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(files.FileLock, "acquire", no_locks)
    files.lock_folder(tmp_path)
    assert "make sure that no other run writes there" in capsys.readouterr().err


# Rows of CSV


def test_rows_are_appended_under_one_header(tmp_path):
    for step in (1, 2):
        files.append_row(tmp_path / "log.csv", {"step": step, "loss": step / 3})
    assert (tmp_path / "log.csv").read_bytes() == b"step,loss\n1,0.333333\n2,0.666667\n"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("step,loss\n5,0.1\n10,0.25\n", "step,loss\n5,0.1\n10,0.25\n"),
        ("step,loss\n5,0.1\n10,0.2", "step,loss\n5,0.1\n"),
        ("step,loss\n5,0.1\n1", "step,loss\n5,0.1\n"),
        ("step,loss\n5,0.1\n15,0.3\n", "step,loss\n5,0.1\n"),
        ("step,loss\n5,0.1\n\0\0\0\0\n", "step,loss\n5,0.1\n"),
        ("step,loss\noops,0.1\n5,0.1\n", "step,loss\n5,0.1\n"),
        ("step,lo", ""),
        ("", ""),
    ],
)
def test_later_rows_and_parts_of_rows_are_dropped(tmp_path, text, kept):
    log = tmp_path / "metrics.csv"
    log.write_text(text)
    files.keep_rows(log, 10)
    assert log.read_text() == kept


def test_a_log_that_is_missing_stays_missing(tmp_path):
    files.keep_rows(tmp_path / "metrics.csv", 10)
    assert not list(tmp_path.iterdir())


# Checksums and numbers


@pytest.mark.parametrize("sha256", ["", "0" * 63, "0" * 65, "g" * 64, "0" * 64 + "\n", "\x1b[31m"])
def test_an_invalid_checksum_is_refused(sha256):
    with pytest.raises(UserError, match="64 hexadecimal digits"):
        files.check_sha256(sha256)


def test_a_checksum_may_be_in_capitals_or_missing():
    for sha256 in (None, "0aF" + "0" * 61):
        files.check_sha256(sha256)


def test_numbers_out_of_range_are_refused_by_name():
    check_at_least(1, num_samples=1, seed=10**400)
    check_above(0, learning_rate=1e-9)
    for value, reason in [(0, "at least 1"), (float("nan"), "finite"), (float("inf"), "finite")]:
        with pytest.raises(UserError, match=f"num_samples is {value}: it must be .*{reason}"):
            check_at_least(1, num_samples=value)
    for value, reason in [(0, "above 0"), (float("nan"), "finite"), (float("inf"), "finite")]:
        with pytest.raises(UserError, match=f"learning_rate is {value}: it must be .*{reason}"):
            check_above(0, learning_rate=value)


def test_an_error_is_one_printable_line():
    assert one_line(ValueError("a\n  b\x1b[31m")) == "a b?[31m"
    assert one_line(MemoryError()) == "MemoryError"
    assert len(one_line("x" * 10_000)) < 700
    assert str(UserError("a\nb")) == "a b"


# Downloads

BODY = b"a file of some length " * 100
SUM = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "TIMEOUT", 0.5)
    Server.files = {"good": BODY, "page": b"<html>sign in</html>", "half": BODY}
    return tmp_path / "cache" / "diffusion-lessons"


def check(path: Path) -> None:
    if not path.read_bytes().startswith(b"a file"):
        raise ValueError("the server sent a page")


def test_a_download_is_kept_in_the_cache(address, cache):
    path = files.fetch(f"{address}/good", SUM.upper(), check)
    Server.files = {}
    assert files.fetch(f"{address}/good", None, check) == path
    assert path.read_bytes() == BODY
    assert [p.name for p in cache.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("page", "the server sent a page"),
        ("missing", "404"),
        ("half", "cut short after 1,100 of 2,200 bytes"),
        ("hangs", "timed out"),
    ],
)
def test_a_bad_download_is_not_kept(address, cache, name, reason):
    start = time.monotonic()
    with pytest.raises(UserError, match=rf"{name} could not be downloaded \(.*{reason}.*nothing"):
        files.fetch(f"{address}/{name}", None, check)
    assert not list(cache.iterdir())
    assert time.monotonic() - start < 10


def test_a_download_with_another_sum_is_not_kept(address, cache):
    with pytest.raises(UserError, match=f"it has the sha256 {SUM}, not 000"):
        files.fetch(f"{address}/good", "0" * 64, check)
    assert not list(cache.iterdir())


@pytest.mark.parametrize(
    ("sha256", "content"), [(SUM, b"a file that was damaged"), (None, b"damaged"), (None, b"")]
)
def test_a_damaged_file_in_the_cache_is_downloaded_again(address, cache, sha256, content):
    path = files.fetch(f"{address}/good", sha256, check)
    path.write_bytes(content)
    assert files.fetch(f"{address}/good", sha256, check).read_bytes() == BODY


def test_size_and_time_of_a_download_are_limited(address, cache, monkeypatch):
    for name, value, reason in [("MAX_BYTES", 100, "larger than"), ("MAX_SECONDS", 0, "longer")]:
        with monkeypatch.context() as patch:
            patch.setattr(files, name, value)
            with pytest.raises(UserError, match=reason):
                files.fetch(f"{address}/good", None, check)
        assert not list(cache.iterdir())


@pytest.mark.parametrize("part", SLOW)
def test_the_time_limit_covers_every_part_of_an_answer(address, cache, monkeypatch, part):
    monkeypatch.setattr(files, "MAX_SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"longer than|trailer|chunk|line|status|Incomplete"):
        files.fetch(f"{address}/{part}", None, check)
    assert time.monotonic() - start < 2
    assert not list(cache.iterdir())


def test_no_part_of_an_address_becomes_a_path(address, cache):
    Server.files = {"..%2f..%2fevil.pt": BODY, "evil.pt?x=": BODY}
    for name in Server.files:
        assert files.fetch(f"{address}/a/../../{name}", None, check).parent == cache
    assert all(path.suffix == ".safetensors" for path in cache.iterdir())


def test_https_does_not_lead_to_http(cache, monkeypatch):
    answer = io.BytesIO(BODY)
    answer.geturl = lambda: "http://example.org/good"  # type: ignore[attr-defined]
    monkeypatch.setattr(files, "urlopen", lambda *_, **__: contextlib.closing(answer))
    with pytest.raises(UserError, match="redirects to an address that is not encrypted"):
        files.fetch("https://example.org/good", None, check)
    assert not list(cache.iterdir())


def test_certificates_are_checked():
    import ssl

    assert ssl.create_default_context().verify_mode == ssl.CERT_REQUIRED
    text = "".join(path.read_text() for path in ROOT.glob("common/*.py"))
    assert "_unverified" not in text
    assert "CERT_NONE" not in text
