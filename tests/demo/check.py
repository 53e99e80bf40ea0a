"""Test the page in node and, where there is one, in a browser: make demo-test.

    python -m tests.demo.check [SCREENSHOT.PNG]

The numbers need node. The page needs a Chromium, found on the path or named by $CHROMIUM, and npm,
which installs playwright-core and axe-core into .venv/demo. What is missing is said.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from lesson_06.demo.build import OUTPUT, ROOT

FOLDER = Path(__file__).resolve().parent
TOOLS = ROOT / ".venv" / "demo"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def main() -> int:
    if shutil.which("node") is None:
        print("skipped: node is not installed")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        vectors = f"{folder}/vectors.json"
        subprocess.run([sys.executable, "-m", "tests.demo.vectors", vectors], cwd=ROOT, check=True)
        failed = subprocess.run(["node", FOLDER / "numbers.mjs", OUTPUT, vectors]).returncode
        return failed or in_browser(vectors)


def in_browser(vectors: str) -> int:
    found = [os.environ.get("CHROMIUM"), *map(shutil.which, BROWSERS)]
    browser = next(filter(None, found), None)
    if browser is None or shutil.which("npm") is None:
        print("the page itself was skipped: it needs npm and a Chromium (or CHROMIUM=its path)")
        return 0
    install = ["npm", "install", "--no-fund", "--no-audit", "--prefix", str(TOOLS)]
    subprocess.run([*install, "playwright-core", "axe-core"], check=True)
    screenshot = [Path(name).resolve() for name in sys.argv[1:]]
    command = ["node", FOLDER / "page.mjs", OUTPUT, vectors, browser, *screenshot]
    return subprocess.run(command, cwd=TOOLS).returncode


if __name__ == "__main__":
    sys.exit(main())
