"""The exception for mistakes that the user can correct, and checks of numbers."""

import math


class UserError(ValueError):
    """One line that says what is wrong and what to do. Scripts print it and exit with code 2."""

    def __init__(self, text: object) -> None:
        super().__init__(one_line(text))


def one_line(error: object, limit: int = 600) -> str:
    """An error's text as one printable line of bounded length, since it may quote a file."""
    text = " ".join(str(error)[:5000].split())
    if not text and isinstance(error, BaseException):
        text = type(error).__name__
    if len(text) > limit:
        text = f"{text[: limit // 2]} ... {text[-limit // 2 :]}"
    return "".join(c if c.isprintable() else "?" for c in text)


def check_at_least(bound: float, **values: float) -> None:
    """Raise UserError for a value that is below the bound, nan or inf; it names the flag."""
    for name, value in values.items():
        check_finite(name, value)
        if value < bound:
            raise UserError(f"{name} is {value}: it must be at least {bound}")


def check_at_most(bound: float, **values: float) -> None:
    """Raise UserError for a value that is above the bound, nan or inf; it names the flag."""
    for name, value in values.items():
        check_finite(name, value)
        if value > bound:
            raise UserError(f"{name} is {value}: it must be at most {bound:,}")


def check_above(bound: float, **values: float) -> None:
    """Raise UserError for a value that is not above the bound, nan or inf; it names the flag."""
    for name, value in values.items():
        check_finite(name, value)
        if value <= bound:
            raise UserError(f"{name} is {value}: it must be above {bound}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error means that memory ran out, on the CPU or on a GPU."""
    words = ("allocate memory", "out of memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def check_finite(name: str, value: float) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} is {value}: it must be a finite number")
