"""Build demo.html: the page, the shipped network and its process, all in one file.

The page runs from a double click, without a server or a network connection. It consists of
index.html, style.css and plain JavaScript modules; this script puts them into one file. The modules
share one scope there, so that `import` and `export` go.
"""

import base64
import json
import re
from pathlib import Path

from common import cli
from common.errors import UserError
from common.files import write_atomically
from lesson_05.class_conditional.sample_mnist import SHIPPED, load

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).resolve().parent
OUTPUT = FOLDER / "demo.html"
IMPORT = re.compile(r'^import \{[^}]*\} from "\./(\w+\.js)";\n', re.MULTILINE)
NAME = re.compile(r"^(?:async )?(?:function\*?|class|const|let) (\w+)", re.MULTILINE)


def main(output: str = str(OUTPUT)) -> None:
    """Build the page that denoises digits in the browser.

    Args:
        output: the file to write.
    """
    page = build().encode()
    write_atomically(Path(output), page)
    print(f"{output}: {len(page) / 1e6:.2f} MB")


def build() -> str:
    """The text of demo.html."""
    process, model, _ = load(SHIPPED)
    parts = {
        "style.css": (FOLDER / "style.css").read_text(encoding="utf-8"),
        "worker": bundle("worker.js"),
        "page": bundle("page.js"),
        "checkpoint": base64.b64encode(Path(SHIPPED).read_bytes()).decode(),
        "alpha_bar": base64.b64encode(process.alpha_bar.numpy().astype("<f8").tobytes()).decode(),
        "digits": base64.b64encode(digits().tobytes()).decode(),
        "mirrors": json.dumps(mirrors(), ensure_ascii=False),
        "parameters": f"{sum(weight.numel() for weight in model.parameters()):,}",
    }
    template = (FOLDER / "index.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{([\w.]+)\}\}", lambda match: parts[match[1]], template)


def bundle(name: str) -> str:
    """A module and all that it imports, each once and after what it needs, as one script."""
    modules: dict[str, str] = {}

    def collect(name: str) -> None:
        text = (FOLDER / name).read_text(encoding="utf-8")
        for needed in IMPORT.findall(text):
            if needed not in modules:
                collect(needed)
        modules[name] = re.sub(r"^export ", "", IMPORT.sub("", text), flags=re.MULTILINE)

    collect(name)
    script = "\n".join(modules.values())
    names = NAME.findall(script)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{name} and its imports define {', '.join(twice)} twice: rename one")
    if re.search(r"^(import|export)\b|</script", script, re.MULTILINE):
        raise UserError(f"{name} and its imports hold an import, an export or an end of a script")
    return script


def mirrors() -> dict[str, dict[str, str | int]]:
    """The lines of Python that the page shows: name -> file, line and code."""
    wanted = json.loads((FOLDER / "mirrors.json").read_text(encoding="utf-8"))
    return {name: find_line(file, code) for name, (file, code) in wanted.items()}


def find_line(file: str, code: str) -> dict[str, str | int]:
    """The only line of a file that consists of this code."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    found = [number for number, line in enumerate(lines, 1) if line.strip() == code]
    if len(found) != 1:
        raise UserError(
            f"{len(found)} lines of {file} are {code!r}: correct lesson_06/demo/mirrors.json, and "
            "the line of JavaScript that mirrors it"
        )
    return {"file": file, "line": found[0], "code": code}


def digits() -> np.ndarray:
    """The first test image of each class of MNIST, uint8 (10, 28, 28)."""
    strip = np.asarray(Image.open(FOLDER / "digits.png"))
    return np.ascontiguousarray(strip.reshape(28, 10, 28).swapaxes(0, 1))


if __name__ == "__main__":
    cli.run(main)
