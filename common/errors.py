"""The one exception that is the user's to mend."""


class UserError(ValueError):
    """What was wrong and what to do, in one line. The command line prints it and exits with 2."""
