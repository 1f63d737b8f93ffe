"""The ``paretune`` logger: statements that a user must see reach stderr unless the application configures logging."""

from __future__ import annotations

import logging
import os

_ROOT = logging.getLogger("paretune")


class _DefaultHandler(logging.StreamHandler):
    """Writes to stderr, from one rank, and steps back as soon as the application has handlers of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        if os.environ.get("RANK", "0") != "0" and record.levelno < logging.ERROR:
            return
        if not logging.getLogger().handlers:
            super().emit(record)


def get(name: str) -> logging.Logger:
    """The logger ``paretune.<name>``; INFO is shown on stderr by default.

    Silence it with ``logging.getLogger("paretune").setLevel(logging.WARNING)``.
    """
    if not any(isinstance(handler, _DefaultHandler) for handler in _ROOT.handlers):
        handler = _DefaultHandler()
        handler.setFormatter(logging.Formatter("paretune: %(message)s"))
        _ROOT.addHandler(handler)
        if _ROOT.level == logging.NOTSET:
            _ROOT.setLevel(logging.INFO)
    return logging.getLogger(f"paretune.{name}")
