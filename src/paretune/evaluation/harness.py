"""A suite's entries as task objects of lm-evaluation-harness: its own, and ours made to look like them."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..generation.prompts import read_rows
from .rows import hub_rows
from .suite import TaskSpec


def build(spec: TaskSpec, data: Path | None) -> dict[str, Any]:
    """The harness's task objects of one entry of a suite, by name: several where it is a group.

    Args:
        spec: the entry.
        data: where its files are.

    Raises:
        DataError: the task is unknown, its data cannot be read, or the harness would run programs without a sandbox.
    """
    try:
        tasks = _ours(spec, data) if spec.kind else _harness(spec)
    except DataError:
        raise
    except ImportError as error:
        raise DataError(
            f"task {spec.task}: needs {error.name}, which is not installed: pip install 'lm_eval[{spec.task}]', "
            f"or leave {spec.task} out"
        ) from error
    except Exception as error:  # whatever a task's own code raises on data that it does not expect
        said = " ".join(str(error).split())[:200]
        raise DataError(
            f"task {spec.task}: cannot be built ({type(error).__name__}: {said}): check its data's columns"
        ) from error
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise DataError(
                f"task {name}: lm-evaluation-harness would run programs without a sandbox: "
                "use kind humaneval, mbpp or ds1000"
            )
    if "ifeval" in spec.harness:
        _check_punkt(spec)
    return tasks


def _check_punkt(spec: TaskSpec) -> None:
    """The harness tries to fetch nltk's sentence splitter, goes on without it, and fails after all answers."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab/english/")
    except LookupError:
        raise DataError(
            f"task {spec.task}: needs nltk's punkt_tab, which could not be fetched: run python -m nltk.downloader "
            f"punkt_tab where there is a network and copy ~/nltk_data, or leave {spec.task} out"
        ) from None


def _ours(spec: TaskSpec, data: Path | None) -> dict[str, Any]:
    """A task of ours as the harness runs it. Rows travel as JSON text: the harness's tables want one type a column."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    kind = spec.ours
    assert kind is not None
    splits = {"measured": _rows_of(spec, data, spec.split)}
    if spec.shots and spec.shots_split:
        splits["examples"] = _rows_of(spec, data, spec.shots_split)
    tables = {
        name: datasets.Dataset.from_dict({"row": [json.dumps(row, ensure_ascii=False) for row in rows]})
        for name, rows in splits.items()
    }
    shown = "examples" if "examples" in tables else "measured"
    config: dict[str, Any] = {
        "task": spec.task,
        "custom_dataset": lambda **_: tables,
        "test_split": "measured",
        "fewshot_split": shown if spec.shots else None,
        "num_fewshot": spec.shots,
        "description": spec.description,
        "doc_to_text": lambda doc: kind.prompt(json.loads(doc["row"])),
        "doc_to_target": lambda doc: kind.target(json.loads(doc["row"])),
        "metric_list": [{"metric": kind.metric, "aggregation": "mean", "higher_is_better": True}],
    }
    if kind.score is None:
        choices = kind.choices
        assert choices is not None
        config |= {"output_type": "multiple_choice", "doc_to_choice": lambda doc: choices(json.loads(doc["row"]))}
    else:
        score = kind.score
        config |= {
            "output_type": "generate_until",
            "process_results": lambda doc, said: {kind.metric: score(json.loads(doc["row"]), said[0])},
            "generation_kwargs": {
                "until": list(kind.until if spec.until is None else spec.until),
                "max_gen_toks": spec.max_tokens or kind.max_tokens,
                **_decoding(spec),
            },
        }
    return {spec.task: ConfigurableTask(config=config)}


def _rows_of(spec: TaskSpec, data: Path | None, split: str) -> list[dict[str, Any]]:
    kind = spec.ours
    assert kind is not None
    if spec.file:
        path = (data or Path(".")) / spec.file
        if not path.exists():
            where = f" (published: {spec.source})" if spec.source else ""
            raise DataError(f"task {spec.task}: {path} is not there{where}: put it there, or set --data")
        rows = read_rows(path, "data")
    else:
        rows, path = hub_rows(spec.hub, spec.config, split, data), Path(spec.hub)
    if spec.columns:
        rows = [{**row, **{ours: row.get(theirs) for ours, theirs in spec.columns.items()}} for row in rows]
    for number, row in enumerate(rows, 1):
        missing = kind.missing(row)
        if missing:
            raise DataError(
                f"task {spec.task}: {path}, row {number} has {', '.join(sorted(row))} and lacks {', '.join(missing)}: "
                f"rename columns in the suite, as columns: {{{missing[0]}: THEIR_NAME}}"
            )
        complaint = kind.check(row) if kind.check else ""
        if complaint:
            raise DataError(f"task {spec.task}: {path}, row {number}: {complaint}")
    return rows


def _harness(spec: TaskSpec) -> dict[str, Any]:
    """A task or group of lm-evaluation-harness; only its folder is scanned, which takes 8 s less than all."""
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    folder = Path(lm_eval.tasks.__file__).parent / spec.harness
    path = Path(spec.harness)
    wanted: Any = spec.task
    if path.suffix in (".yaml", ".yml"):
        manager, wanted = TaskManager(include_defaults=False), str(path)
        if not path.is_file():
            raise DataError(f"task {spec.task}: {path} is not there: give a task file of lm-evaluation-harness")
    else:
        manager = TaskManager(include_defaults=False, include_path=str(folder)) if folder.is_dir() else TaskManager()
        if spec.task not in manager.all_tasks:
            near = [name for name in manager.all_tasks if spec.task.split("_")[0] in name][:3]
            raise DataError(
                f"task {spec.task}: lm-evaluation-harness has none of this name in {spec.harness}"
                + (f": did you mean {', '.join(near)}?" if near else ": see lm-eval ls tasks")
            )
    tasks: dict[str, Any] = manager.load([wanted])["tasks"]
    for task in tasks.values():
        task.set_config(key="num_fewshot", value=spec.shots)
        if task.get_config("output_type") == "generate_until":
            change: dict[str, Any] = _decoding(spec)
            if spec.max_tokens is not None:
                change["max_gen_toks"] = spec.max_tokens
            if spec.until is not None:
                change["until"] = list(spec.until)
            task.set_config(key="generation_kwargs", value=change, update=True)
    return tasks


def _decoding(spec: TaskSpec) -> dict[str, Any]:
    return {"do_sample": spec.temperature > 0, "temperature": spec.temperature}


@contextlib.contextmanager
def quiet(level: int) -> Iterator[None]:
    """lm-evaluation-harness's remarks from this level on; the handler of last resort prints them."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
