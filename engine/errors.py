"""What can go wrong, and where the code lies. Every other file may import this one."""
import os

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))     # the folder of model.py


class ConfigError(Exception):
    """A user's mistake: the message is one line that names the key or file and says what to do."""


class DataError(Exception):
    """Data that is missing or wrong: the message is one line that names the file and says what to do."""


class ReadError(DataError):
    """The same, met by one process in the middle of a run while the others go on: each that meets it says so."""


class CheckpointError(Exception):
    """A checkpoint that is missing, damaged or of another shape: one line that names the file and says what to do."""


class RunError(Exception):
    """A run that cannot go on through no mistake in the settings (a loss that stays NaN): one line; exit code 1."""


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:150].strip()
