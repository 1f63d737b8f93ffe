"""The flags of every command that measures skills on a suite, and the suite that they name."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from paretune.errors import ArgumentError

if TYPE_CHECKING:
    from paretune.evaluation.suite import Suite


def add_suite(group: argparse._ArgumentGroup) -> None:
    """Add the flags that choose a suite.

    Args:
        group: gets them.
    """
    add = group.add_argument
    add("--suite", metavar="NAME|FILE.yaml", help="a suite's name, or your own")
    add("--data", metavar="DIR", type=Path, help="the suite's files, and a mirror of hub data sets")
    add("--only", metavar="NAME,…", help="these tasks or categories alone")
    add("--skip", metavar="NAME,…", help="leave these tasks or categories out")
    add("--chat-template", action=argparse.BooleanOptionalAction, help="of benchmarks; as the suite says, if unset")
    add("--allow-code-execution", action="store_true", help="run programs that the models write, in a sandbox")


def open_suite(arguments: argparse.Namespace) -> Suite:
    """The suite that the flags name.

    Raises:
        ArgumentError: none was named, or it has no such tasks.
    """
    from paretune.evaluation.suite import load

    if arguments.suite is None:
        raise ArgumentError("suite", None, "give a suite; paretune measure --list-suites shows them")
    suite = load(arguments.suite)
    if arguments.only:
        suite = suite.only(arguments.only.split(","))
    if arguments.skip:
        suite = suite.without(arguments.skip.split(","))
    if arguments.chat_template is not None:
        suite = dataclasses.replace(suite, chat=arguments.chat_template)
    return suite
