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
