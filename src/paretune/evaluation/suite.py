"""Suites: which tasks measure capability, in which categories, with which shots and decoding, as YAML."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from ..errors import ArgumentError, DataError
from .tasks import KINDS, Kind


@dataclass(frozen=True)
class TaskSpec:
    """One task of a suite: one of lm-evaluation-harness (``harness``) or one of ours (``kind``).

    Args:
        task: its name; of a harness task or group, the harness's.
        category: what it counts for.
        harness: the folder of lm-evaluation-harness's tasks that holds it, such as ``gsm8k``, or a YAML file.
        kind: a layout and score of ours, one of `paretune measure --list-suites`.
        metric: of a harness task: which of its metrics counts; lists and BLEU become one number an item.
        filter: of a harness task: which of its filters; the first by default.
        shots: examples in the prompt.
        max_tokens, until, temperature: how answers are written; greedy by default, the task's own where unset.
        hub, config, split: a data set of the Hugging Face hub; of a harness task its own are taken.
        shots_split: where examples come from; the measured split without the row itself by default.
        file: a file of rows instead of the hub, below the suite's folder or ``--data``.
        columns: {our name: the file's name}.
        cluster: the column that groups items, such as their passage; a kind of ours knows it.
        description: what stands before the examples.
        real_data: whether it has ever met its published data set here. A harness task has, in the harness.
        source: where the data are published.
        note: how this differs from the paper.
    """

    task: str
    category: str
    harness: str = ""
    kind: str = ""
    metric: str = ""
    filter: str = ""
    shots: int = 0
    max_tokens: int | None = None
    until: tuple[str, ...] | None = None
    temperature: float = 0.0
    hub: str = ""
    config: str = ""
    split: str = "test"
    shots_split: str = ""
    file: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    cluster: str = ""
    description: str = ""
    real_data: bool = False
    source: str = ""
    note: str = ""

    @property
    def ours(self) -> Kind | None:
        """The kind, or None for a harness task."""
        return KINDS[self.kind] if self.kind else None

    @property
    def runs_code(self) -> bool:
        return self.ours is not None and self.ours.runs_code


@dataclass(frozen=True)
class Suite:
    """Tasks in categories.

    Args:
        name: of the suite.
        tasks: in order.
        paper: what it follows.
        about: one line.
        chat: whether prompts go through the tokenizer's chat template.
        folder: where its files are; None for the built-in ones.
    """

    name: str
    tasks: tuple[TaskSpec, ...]
    paper: str = ""
    about: str = ""
    chat: bool = False
    folder: Path | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides a score but the data."""
        record = dataclasses.asdict(dataclasses.replace(self, folder=None))
        return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]

    def without(self, names: list[str]) -> Suite:
        """The suite without some tasks or categories.

        Raises:
            ArgumentError: there is no such task or category, or none is left.
        """
        known = {task.task for task in self.tasks} | {task.category for task in self.tasks}
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ArgumentError("skip", unknown[0], f"give a task or category of {self.name}: {_list(known)}")
        kept = tuple(task for task in self.tasks if task.task not in names and task.category not in names)
        if not kept:
            raise ArgumentError("skip", names, f"nothing of {self.name} is left: skip less")
        return dataclasses.replace(self, tasks=kept)

    def only(self, names: list[str]) -> Suite:
        """The suite's tasks or categories of these names.

        Raises:
            ArgumentError: there is no such task or category.
        """
        known = {task.task for task in self.tasks} | {task.category for task in self.tasks}
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ArgumentError("only", unknown[0], f"give a task or category of {self.name}: {_list(known)}")
        kept = tuple(task for task in self.tasks if task.task in names or task.category in names)
        return dataclasses.replace(self, tasks=kept)


def built_in() -> dict[str, Suite]:
    """The suites that come with paretune, by name.

    Example:
        >>> sorted(built_in())
        ['alignment-tax', 'online-merging', 'tiny-world', 'xright']
    """
    found = {}
    for entry in files(__package__).joinpath("suites").iterdir():
        if entry.name.endswith(".yaml"):
            suite = parse(entry.read_text(encoding="utf-8"), entry.name)
            found[suite.name] = suite
    return dict(sorted(found.items()))


def load(name: str) -> Suite:
    """A built-in suite by name, or the user's own by path.

    Args:
        name: such as ``online-merging``, or ``my-suite.yaml``.

    Raises:
        ArgumentError: there is no such suite.
        DataError: the file is no suite.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{name}: the suite cannot be read ({error}): give a YAML file") from None
        return dataclasses.replace(parse(text, name), folder=path.resolve().parent)
    suites = built_in()
    if name not in suites:
        raise ArgumentError("suite", name, f"give one of {', '.join(suites)}, or a YAML file of your own")
    return suites[name]


def parse(text: str, where: str) -> Suite:
    """A suite from YAML.

    Args:
        text: the YAML.
        where: what to call it in errors.

    Raises:
        DataError: naming the task and the field that cannot be what it is.
    """
    try:
        record = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataError(f"{where}: not YAML ({' '.join(str(error).split())}): mend it there") from None
    if not isinstance(record, Mapping) or not isinstance(record.get("tasks"), list) or not record["tasks"]:
        raise DataError(f"{where}: a suite has a list of tasks: see docs/measure.md")
    unknown = set(record) - {"suite", "paper", "about", "chat", "tasks"}
    if unknown:
        raise DataError(f"{where}: {_list(unknown)}: no such field; a suite has suite, paper, about, chat, tasks")
    tasks = tuple(_task(each, where) for each in record["tasks"])
    names = [task.task for task in tasks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{where}: task {twice!r} occurs twice: give each its own name")
    return Suite(
        str(record.get("suite", Path(where).stem)),
        tasks,
        str(record.get("paper", "")),
        str(record.get("about", "")),
        bool(record.get("chat", False)),
    )


def _task(record: object, where: str) -> TaskSpec:
    if not isinstance(record, Mapping) or not isinstance(record.get("task"), str):
        raise DataError(f"{where}: {str(record)[:60]!r}: each task has a name, as - task: gsm8k")
    where = f"{where}, task {record['task']}"
    known = {each.name: each for each in dataclasses.fields(TaskSpec)}
    unknown = [name for name in record if name not in known]
    if unknown:
        raise DataError(f"{where}: {_list(unknown)}: no such field; there are {_list(known)}")
    given: dict[str, Any] = {"category": record["task"], **record}
    if bool(given.get("harness")) == bool(given.get("kind")):
        raise DataError(f"{where}: give either harness (a folder of lm-evaluation-harness) or kind (one of ours)")
    if given.get("kind") and given["kind"] not in KINDS:
        raise DataError(f"{where}: kind={given['kind']!r} is unknown: give one of {_list(KINDS)}")
    for name, kinds in (("shots", int), ("max_tokens", int), ("temperature", (int, float)), ("columns", Mapping)):
        value = given.get(name)
        if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
            raise DataError(f"{where}: {name}={value!r}: give {'a mapping' if kinds is Mapping else 'a number'}")
    if given.get("shots", 0) < 0 or given.get("temperature", 0) < 0 or given.get("max_tokens", 1) < 1:
        raise DataError(f"{where}: shots and temperature are 0 or more, max_tokens 1 or more")
    if given.get("until") is not None:
        until = given["until"]
        given["until"] = (until,) if isinstance(until, str) else tuple(until)
    if given.get("kind") and not (given.get("hub") or given.get("file")):
        raise DataError(f"{where}: give hub (a data set of the hub) or file (a file of rows)")
    return TaskSpec(**given)


def _list(names: Any) -> str:
    return ", ".join(sorted(map(str, names)))
