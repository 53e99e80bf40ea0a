"""The one exception that is the user's to mend."""


class UserError(ValueError):
    """What was wrong and what to do, in one line. The command line prints it and exits with 2."""


def printable(error: object) -> str:
    """What an error says, in one line; it may hold words from a file."""
    words = " ".join(str(error).split())
    return "".join(c if c.isprintable() else "?" for c in words)
