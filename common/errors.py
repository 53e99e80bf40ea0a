"""The one exception that is the user's to mend."""


class UserError(ValueError):
    """What was wrong and what to do, in one line. The command line prints it and exits with 2."""


def printable(error: object) -> str:
    """What an error says, in one line of bounded length; it may hold words from a file."""
    words = " ".join(str(error)[:5000].split())
    words = words if len(words) <= 600 else f"{words[:300]} ... {words[-300:]}"
    return "".join(c if c.isprintable() else "?" for c in words)
