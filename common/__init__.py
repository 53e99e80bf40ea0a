"""What the lessons share. A script must run with the common/ of its own clone."""

import os
import shlex
import sys
from pathlib import Path

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
