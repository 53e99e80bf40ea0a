"""What the lessons share. A script must run with the common/ of its own clone."""

import os
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = Path(getattr(sys.modules["__main__"], "__file__", None) or ROOT).resolve()
CLONES = [path for path in SCRIPT.parents if (path / "common" / "options.py").exists()]
PATHS = os.environ.get("PYTHONPATH", "").split(os.pathsep)
CHOSEN = [Path(path).resolve() for path in PATHS if path]

# An environment in which another clone is installed would silently run that clone's common/.
if CLONES and CLONES[0] != ROOT and ROOT not in CHOSEN:
    print(
        f"error: this script is in {CLONES[0]}, but {ROOT} is installed in this environment: "
        f"run `pip install -e {shlex.quote(str(CLONES[0]))}`, or set PYTHONPATH to the right clone",
        file=sys.stderr,
    )
    raise SystemExit(2)
