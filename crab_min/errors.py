"""Errors that a user can cause."""


class ModelError(ValueError):
    """A model, or weights, that cannot be used: which, what is wrong, what to do."""


class EncoderError(ValueError):
    """An encoder that cannot be built or whose weights cannot be had: the value, what was expected, what to do."""


class RunError(ValueError):
    """A run, its folder or its flags that cannot be used: which one, why, what to do."""


class WorldError(ValueError):
    """A folder of things that cannot be used, with the file and what to do."""


class MediaError(ValueError):
    """A media file that cannot be used: its path, the reason and what to do, in one line."""


class InterfaceError(ValueError):
    """A row or a prompt that does not fit its task: names the task, the field, the value and what is expected."""


class DataError(ValueError):
    """An annotation file or row that cannot be used: which one, what is wrong, what to do."""


class ConvertError(ValueError):
    """A checkpoint that cannot be read or does not have the expected names: which, what was expected, what to do."""
