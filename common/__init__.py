"""What the lessons share. A script must run with the common/ of its own clone.

Importing it before torch also sets how torch's threads wait, and how many there are.
"""

import os
import shlex
import sys
from pathlib import Path
from typing import Any

root = Path(__file__).resolve().parent.parent
clone = Path(getattr(sys.modules["__main__"], "__file__", None) or root / "none").resolve().parent
while (clone / "__init__.py").exists():  # up from lesson_05/text_to_image, say
    clone = clone.parent
paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
chosen = [Path(path).resolve() for path in paths if path]

# An environment in which another clone is installed would silently run that clone's common/.
if (clone / "common" / "options.py").exists() and root not in (clone, *chosen):
    print(
        f"error: this script is in {clone}, but {root} is installed in this environment: "
        f"run `pip install -e {shlex.quote(str(clone))}`, or set PYTHONPATH to the right clone",
        file=sys.stderr,
    )
    raise SystemExit(2)


def say_stopped(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Ctrl-C while modules are imported, which takes seconds: common/cli.py is not there yet."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped: the same command starts again", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if clone == root:  # in a script of these lessons only
    sys.excepthook = say_stopped


def cpu_quota(cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """How many CPUs a container may use at once; infinite if there is no limit."""
    for file, period in (("cpu.max", ""), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            numbers = (cgroup / file).read_text().split()
            numbers += (cgroup / period).read_text().split() if period else []
            quota, microseconds = map(float, numbers)
        except (OSError, ValueError):  # "max" is no number, and means no limit
            continue
        if quota > 0 < microseconds:
            return quota / microseconds
    return float("inf")


# OpenMP's threads wait for each other in busy loops. Beside another such process, each waits for a
# thread that the other process keeps from running (benchmarks/README.md has figures).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
quota = cpu_quota()
if quota < (os.cpu_count() or 1):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, int(quota))))
