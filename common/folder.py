"""The folder of a training run: which checkpoints it holds, its log, and that it is ours alone."""

import csv
import re
import sys
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from common import checkpoint
from common.errors import UserError


def saved(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder, oldest first."""
    return sorted(filter(step_of, folder.glob("checkpoint_*.pt")), key=step_of)


def step_of(path: Path) -> int:
    """After how many steps it was saved; 0 for a file of another name."""
    number = re.fullmatch(r"checkpoint_(\d+)\.pt", path.name)
    return int(number[1]) if number else 0


def find_checkpoint(resume: str, folder: Path) -> Path:
    if resume != "latest":
        return Path(resume)
    if not saved(folder):
        raise UserError(f"{folder} holds no checkpoint to resume: start without --resume")
    return saved(folder)[-1]


def open_folder(folder: Path, fresh: bool) -> FileLock:
    """Make the folder and lock it; refuse one that holds a run already, or cannot be written."""
    if fresh and (saved(folder) or (folder / "metrics.csv").exists()):
        raise UserError(
            f"{folder} holds a run already: go on with it by --resume, name another --output_dir, "
            "or remove it"
        )
    checkpoint.make_folder(folder)
    held = lock(folder)
    for part in folder.glob(".*.part"):  # of a run that was killed while it wrote
        part.unlink(missing_ok=True)
    return held


def lock(folder: Path) -> FileLock:
    """Hold the folder until release() or the end of this process, however that comes."""
    held = FileLock(folder / ".lock", timeout=0)
    try:
        held.acquire()
    except Timeout:
        raise UserError(
            f"another run is writing into {folder}: wait for its end, or name another --output_dir"
        ) from None
    except (OSError, NotImplementedError) as error:  # some network drives have no locks
        print(
            f"{folder} cannot be locked ({error}): see to it that no second run writes there",
            file=sys.stderr,
        )
    return held


def append_row(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow({k: v if isinstance(v, int) else f"{v:.6g}" for k, v in row.items()})


def keep_rows(path: Path, step: int) -> None:
    """Drop the rows behind a step, which are written anew, and one that was cut short."""
    if not path.exists():
        return
    header, *rows = path.read_text(errors="replace").splitlines(keepends=True) or [""]

    def whole(row: str) -> bool:
        return row.endswith("\n") and row.count(",") == header.count(",")

    kept = [row for row in rows if whole(row) and is_up_to(row.partition(",")[0], step)]
    checkpoint.write_whole(path, "".join([header, *kept] if whole(header) else []).encode())


def is_up_to(number: str, step: int) -> bool:
    return number.isdecimal() and int(number) <= step
