"""The errors that a user can cause.

Commands print their text as one line and exit with 2.
"""


class UserError(ValueError):
    """An error that the user can mend.

    It names the value, what was expected and what to do.
    """


class DataError(UserError):
    """A row, a prompt or an annotation file that cannot be used."""


class MediaError(UserError):
    """A video, sound or image file that cannot be read."""


class ModelError(UserError):
    """A model, its weights or its settings that cannot be used."""


class RunError(UserError):
    """A run folder or a flag that cannot be used."""


def listed(names: list[str], most: int = 10) -> str:
    """Return names for a message, with commas between them: the first ones of many."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
