"""Everything paretune raises on purpose.

    PareTuneError
    ├── ArgumentError      (also ValueError)   an argument cannot be what it is
    ├── CheckpointError                        a checkpoint cannot be read, or not safely
    │   └── MismatchError                      two models, or a model and a task vector, do not fit
    ├── StateError                             a saved optimizer state belongs to another run
    ├── DataError                              a data set cannot be trained on
    ├── EndpointError                          a model server cannot be reached, or does not answer properly
    └── MissingExtraError  (also ImportError)  an optional package is not installed

Every message is one line that names what is wrong, the value that was given, and the mend.
"""

from __future__ import annotations

from collections.abc import Iterable


class PareTuneError(Exception):
    """Base of all errors that paretune raises on purpose."""


class ArgumentError(PareTuneError, ValueError):
    """An argument has a value that cannot work.

    Args:
        argument: its name, as the user wrote it.
        value: what was given.
        mend: what to do instead.
    """

    def __init__(self, argument: str, value: object, mend: str) -> None:
        super().__init__(f"{argument}={_short(value)}: {mend}")
        self.argument = argument
        self.value = value
        self.mend = mend

    def __reduce__(self) -> tuple[type[ArgumentError], tuple[str, object, str]]:
        return type(self), (self.argument, self.value, self.mend)


class CheckpointError(PareTuneError):
    """A checkpoint is missing, incomplete, unsafe or of an unsupported kind."""


class MismatchError(CheckpointError):
    """Two models, or a model and a task vector, do not fit together."""


class StateError(PareTuneError):
    """A saved optimizer state does not belong to this optimizer, task vector or parameter order."""


class DataError(PareTuneError):
    """A data set is empty, lacks columns or cannot be read."""


class EndpointError(PareTuneError):
    """A model server cannot be reached, refuses a request, or does not answer properly.

    Args:
        message: what happened.
        status: the HTTP status with which it refused; None where it did not answer properly in any attempt.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class MissingExtraError(PareTuneError, ImportError):
    """An optional dependency is not installed.

    Args:
        package: what cannot be imported.
        extra: the extra of paretune that brings it.
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed: pip install 'paretune[{extra}]'")


def examples(names: Iterable[str], limit: int = 3) -> str:
    """The first names of a list and how many there are: ``'a, b, c (3 of 17)'``."""
    found = sorted(names)
    shown = ", ".join(found[:limit])
    return f"{shown} ({min(limit, len(found))} of {len(found)})"


def _short(value: object, limit: int = 120) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
