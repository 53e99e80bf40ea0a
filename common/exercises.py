"""The frame of every exercises.py: which answers are right, and which have a blank left."""

import re
import sys
from collections.abc import Callable, Mapping
from typing import Any


def run(names: Mapping[str, Any]) -> None:
    """Call the checks named in the command line's numbers, or all; exit code 1 if any fails.

    Args:
        names: globals() of the exercises. Exercise 3 has a function check_3_NAME, which raises
            AssertionError with a line for the reader where the answer is wrong.
    """
    checks = {m[1]: names[name] for name in names if (m := re.match(r"check_(\d+)_", name))}
    wanted = sys.argv[1:] or list(checks)
    if unknown := [number for number in wanted if number not in checks]:
        print(f"error: no exercise {unknown[0]}: choose from {', '.join(checks)}", file=sys.stderr)
        sys.exit(2)
    answers = {number: verdict(checks[number]) for number in wanted}
    for number, answer in answers.items():
        print(f"{number} {checks[number].__name__.split('_', 2)[2]}: {answer}")
    sys.exit(any(answer != "right" for answer in answers.values()))


def verdict(check: Callable[[], None]) -> str:
    """right, or what is not right yet."""
    try:
        check()
    except AssertionError as error:
        return f"not yet: {error}"
    except Exception as error:  # of the reader's lines: they may raise anything
        if "ellipsis" in str(error).lower():
            return "not yet: fill in the ..."
        return f"not yet: {type(error).__name__}: {error}"
    return "right"
