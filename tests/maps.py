"""Compare the equation maps of the READMEs with the code, and correct their line numbers.

    python -m tests.maps          reports what is wrong
    python -m tests.maps --fix    rewrites the line number of every link to a name in the code

A map is the table below a heading "Equation map": equation | link to the function | test. The code
names the same equations in its docstrings, in brackets: [Ho20 Eq. 6, 7]. Within a lesson, both must
name the same equations for each function.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\[`([^`\]]+)`\]\(([\w./]+\.py)(?:#L(\d+))?\)")
KEY = re.compile(r"\[((?:[A-Z][A-Za-z]+\d\d|Eq\.|Section|Appendix|Figure|Table)(?=[ ,])[^\]]*)\]")
WORD = re.compile(
    r"(?P<paper>[A-Z][A-Za-z]+\d\d)|(?P<kind>Eq\.|Section|Appendix|Algorithm|Theorem|Lemma|Figure"
    r"|Table)|(?P<first>\d+)-(?P<last>\d+)|(?P<item>\d+(?:\.\d+)?|\b[A-Z](?:\.\d+)?\b)"
)
Claim = tuple[str, str, str]  # equation, file, name: "Ho20 Eq. 4", "lesson_05/ddpm.py", "DDPM.loss"


def readmes() -> list[Path]:
    """The READMEs of the lessons, and the glossary."""
    lessons = sorted(p for p in ROOT.glob("lesson_*/**/README.md") if "output" not in p.parts)
    return [*ROOT.glob("GLOSSARY.md"), *lessons]


def equations(text: str, paper: str = "") -> Iterator[str]:
    """Ho20 Eq. 6, 7 -> Ho20 Eq. 6 and Ho20 Eq. 7; words that name no equation yield nothing."""
    kind = ""
    for match in WORD.finditer(text):
        if match["paper"]:
            paper, kind = match["paper"], ""
        elif match["kind"]:
            kind = match["kind"]
        elif kind and match["first"]:
            for number in range(int(match["first"]), int(match["last"]) + 1):
                yield f"{paper} {kind} {number}"
        elif kind:
            yield f"{paper} {kind} {match['item']}"


def definitions(path: Path) -> dict[str, tuple[int, str]]:
    """The line and the docstring of each class, function and constant, and of the file itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = {path.name: (1, ast.get_docstring(tree) or "")}

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                found[prefix + node.name] = (node.lineno, ast.get_docstring(node) or "")
            if isinstance(node, ast.ClassDef):
                collect(node.body, f"{prefix}{node.name}.")
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found[prefix + node.targets[0].id] = (node.lineno, "")

    collect(tree.body, "")
    return found


def in_file(name: str, path: Path) -> str:
    """The name within its file: main for train_mnist.main; train_mnist.py for the file itself."""
    return name if name == path.name else name.removeprefix(f"{path.stem}.")


def rows(readme: Path) -> Iterator[tuple[str, list[tuple[str, str]], list[str]]]:
    """For each row of its maps: the paper and equations, the links (name, file) and the tests."""
    for part in re.split(r"^#+ ", readme.read_text(encoding="utf-8"), flags=re.MULTILINE):
        if not part.startswith("Equation map"):
            continue
        lines = [line.strip("|").split("|") for line in part.splitlines() if line.startswith("|")]
        paper = lines[0][0].strip()
        for equation, where, tests, *_ in lines[2:]:
            links = [(name, file) for name, file, _ in LINK.findall(where)]
            yield f"{paper} {equation.strip()}", links, re.findall(r"`(test_\w+)`", tests)


def claims_of_map(lesson: str) -> set[Claim]:
    """The equations that the maps of a lesson name, with file and function."""
    claims = set()
    for readme in readmes():
        if readme.relative_to(ROOT).parts[0] == lesson:
            for key, links, _ in rows(readme):
                for name, file in links:
                    path = (readme.parent / file).resolve().relative_to(ROOT).as_posix()
                    short = in_file(name, Path(file))
                    claims |= {(equation, path, short) for equation in equations(key)}
    return claims


def claims_of_code(lesson: str) -> set[Claim]:
    """The equations that the docstrings of a lesson name, with file and function."""
    claims = set()
    for path in sorted((ROOT / lesson).rglob("*.py")):
        for name, (_, docstring) in definitions(path).items():
            keys = " ".join(
                KEY.findall(" ".join(docstring.split()))
            )  # it is enough to name the paper once
            file = path.relative_to(ROOT).as_posix()
            claims |= {(equation, file, name) for equation in equations(keys)}
    return claims


def disagreements(lesson: str) -> list[str]:
    """One line for each equation that only the maps or only the docstrings of a lesson name."""
    of_map, of_code = claims_of_map(lesson), claims_of_code(lesson)
    return [
        f"{file}: the docstring of {name} names {equation}, the map does not"
        for equation, file, name in sorted(of_code - of_map)
    ] + [
        f"{file}: the map has {equation} at {name}, whose docstring does not name it"
        for equation, file, name in sorted(of_map - of_code)
    ]


def stale_links(fix: bool = False) -> list[str]:
    """One line for each README link to a name in the code that leads elsewhere. fix corrects
    them."""
    wrong = []
    known: dict[Path, dict[str, tuple[int, str]]] = {}
    for readme in readmes():
        text = readme.read_text(encoding="utf-8")

        def mend(match: re.Match[str], readme: Path = readme) -> str:
            name, file, line = match.groups()
            path = readme.parent / file
            if path not in known:
                known[path] = definitions(path) if path.is_file() else {}
            found = known[path]
            shown = readme.relative_to(ROOT)
            short = in_file(name, path)
            if short not in found:
                wrong.append(f"{shown}: {file} defines no {name}")
                return match[0]
            target = file if short == path.name else f"{file}#L{found[short][0]}"
            if match[0] != f"[`{name}`]({target})":
                wrong.append(f"{shown}: {name} is at {target}, the link has line {line}")
            return f"[`{name}`]({target})"

        mended = LINK.sub(mend, text)
        if fix and mended != text:
            readme.write_text(mended, encoding="utf-8")
    return wrong


def main() -> int:
    if "--fix" in sys.argv[1:]:
        before = len(stale_links())
        stale_links(fix=True)
        print(f"{before - len(stale_links())} links corrected")
    wrong = stale_links()
    for lesson in sorted(path.parent.name for path in ROOT.glob("lesson_*/README.md")):
        wrong += disagreements(lesson)
    print(*wrong, f"{len(wrong)} errors", sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
