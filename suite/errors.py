"""What can be wrong outside the code: each kind has its exit code on the command line."""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """An option, method, backbone or recipe key that does not exist or cannot be. Exit code 2."""

    exit_code = 2


class DataError(ValueError):
    """A manifest, file or label that cannot be used. Exit code 3."""

    exit_code = 3


class AdapterError(ValueError):
    """An adapter that is damaged or does not fit the backbone. Exit code 4."""

    exit_code = 4


class ResourceError(RuntimeError):
    """Disk, memory or rights are missing. Exit code 5."""

    exit_code = 5


class Diverged(RuntimeError):
    """Training that only makes non-finite steps. Exit code 1."""

    exit_code = 1


class Inexact(RuntimeError):
    """A written model that does not say what the adapter says. Exit code 1."""

    exit_code = 1


def nearest(word: str, choices: Iterable[str]) -> str:
    """The end of an error line: the names closest to `word`, or all of them when none is close."""
    choices = sorted(choices)
    close = difflib.get_close_matches(word, choices, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"there is: {', '.join(choices) or 'nothing'}"
