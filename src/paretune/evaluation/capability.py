"""Capability of many models on one suite: lm-evaluation-harness as a library, tasks built once, scores item by item."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError, DataError, MissingExtraError
from .harness import build, quiet
from .points import ItemScores
from .rows import mirror
from .sandbox import run_program
from .suite import Suite, TaskSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FEWSHOT_SEED = 1234  # lm-evaluation-harness's own default, so that its command line gives the same numbers


@dataclass(frozen=True)
class Capability:
    """What one model scored.

    Args:
        items: the scores on each benchmark, item by item.
        prompts: hash of all prompts; equal where two models read the same.
        samples: per benchmark, each item's question, answer and score, for reading.
        corpus: scores that are not means over items, such as BLEU.
    """

    items: dict[str, ItemScores]
    prompts: str
    samples: dict[str, list[dict[str, Any]]]
    corpus: dict[str, float]


class Benchmarks:
    """A suite's tasks, built once and asked of as many models as wanted.

    Args:
        suite: what to measure.
        data: a folder with the suite's files and a mirror of hub data sets, as ``DIR/openai/gsm8k/main/test.jsonl``.
        limit: items of each task, the first ones; all by default.
        allow_code: whether programs that a model wrote may be run, in the sandbox.

    Raises:
        MissingExtraError: lm-evaluation-harness is not installed.
        DataError: a task or its data cannot be read.
        ArgumentError: the suite runs code and ``allow_code`` is not set; or the limit is not positive.
    """

    def __init__(
        self, suite: Suite, *, data: Path | None = None, limit: int | None = None, allow_code: bool = False
    ) -> None:
        if limit is not None and limit < 1:
            raise ArgumentError("limit", limit, "give a positive number of items, or leave it out for all")
        running = [task.task for task in suite.tasks if task.runs_code]
        if running and not allow_code:
            raise ArgumentError(
                "allow-code-execution",
                False,
                f"{', '.join(running)} of {suite.name} run programs that the model wrote: set it (they run in a "
                "sandbox), or skip them",
            )
        try:
            import lm_eval  # noqa: F401
        except ImportError:
            raise MissingExtraError("lm_eval", "eval") from None
        if running:
            run_program("pass")  # a machine that cannot lock programs in says so before hours of answers
        self.suite, self.limit = suite, limit
        self.data = data if data is not None else suite.folder
        with quiet(logging.ERROR), mirror(self.data):
            self._tasks = {spec.task: build(spec, self.data) for spec in suite.tasks}
        names = [name for tasks in self._tasks.values() for name in tasks]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise DataError(f"{suite.name}: lm-evaluation-harness's task {twice!r} occurs twice: leave one out")

    @cached_property
    def fingerprint(self) -> str:
        """Hash of every measured row and of lm-evaluation-harness's version."""
        from importlib.metadata import version

        digest = hashlib.sha256(version("lm_eval").encode())
        for tasks in self._tasks.values():
            for name, task in tasks.items():
                digest.update(name.encode())
                for _, doc in task.doc_iterator(limit=self.limit):
                    digest.update(json.dumps(doc, sort_keys=True, default=str).encode())
        return digest.hexdigest()[:16]

    @cached_property
    def decoding(self) -> dict[str, dict[str, Any]]:
        """How each task's answers are written; tasks that compare log-likelihoods are left out."""
        return {
            name: dict(task.get_config("generation_kwargs"))
            for tasks in self._tasks.values()
            for name, task in tasks.items()
            if task.get_config("output_type") == "generate_until"
        }

    def check(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 8) -> Any:
        """The harness's view of a model, refused before any work where the suite cannot be asked of it.

        Args:
            model, tokenizer, batch_size: as for `measure`.

        Raises:
            ArgumentError: the suite wants a chat template and the tokenizer has none, or answers that leave no room
                for a prompt.
        """
        from lm_eval.models.huggingface import HFLM

        if self.suite.chat and not tokenizer.chat_template:
            raise ArgumentError(
                "chat-template",
                True,
                f"the tokenizer of {getattr(model, 'name_or_path', 'the model')} has no chat template: "
                "measure with --no-chat-template, or give it one",
            )
        with quiet(logging.ERROR):
            # Handed over as an object it computes on the model's device, and forgets nothing of the model's changes.
            lm: Any = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        for name, settings in self.decoding.items():
            longest = settings.get("max_gen_toks", lm.max_gen_toks)
            if longest >= lm.max_length:
                raise ArgumentError(
                    f"max_tokens of {name}",
                    longest,
                    f"the model has room for {lm.max_length} tokens, prompt included: lower max_tokens in the suite",
                )
        return lm

    def measure(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 8,
        progress: bool = True,
    ) -> Capability:
        """One model's scores. Nothing is kept between calls: no cache of answers can confuse two models.

        Args:
            model: a causal language model, in evaluation mode.
            tokenizer: its tokenizer.
            batch_size: requests at once.
            progress: whether to show the harness's bars on stderr.

        Raises:
            ArgumentError: as `check`.
        """
        from lm_eval import evaluator

        lm = self.check(model, tokenizer, batch_size=batch_size)
        flat = {name: task for tasks in self._tasks.values() for name, task in tasks.items()}
        for task in flat.values():
            task.set_fewshot_seed(FEWSHOT_SEED)  # else the second model would get other examples than the first
        if not progress:
            for kind in ("generate_until", "loglikelihood", "loglikelihood_rolling"):
                setattr(lm, kind, partial(getattr(lm, kind), disable_tqdm=True))
        with quiet(logging.WARNING), _seeds(), _decoding_of_the_suite(model):
            found: Any = evaluator.evaluate(
                lm=lm,
                task_dict={"tasks": flat},
                limit=self.limit,
                bootstrap_iters=0,  # the intervals are paired, and ours
                apply_chat_template=self.suite.chat,
                fewshot_as_multiturn=self.suite.chat,
                confirm_run_unsafe_code=False,
            )
        prompts = hashlib.sha256()
        items: dict[str, ItemScores] = {}
        samples: dict[str, list[dict[str, Any]]] = {}
        corpus: dict[str, float] = {}
        for spec in self.suite.tasks:
            by_task = {name: _chosen(spec, name, found["samples"][name]) for name in self._tasks[spec.task]}
            rows = [(name, sample) for name, own in by_task.items() for sample in own]
            prompts.update("".join(str(sample["prompt_hash"]) for _, sample in rows).encode())
            metric = spec.metric or (spec.ours.metric if spec.ours else "acc")
            scores = [item_score(spec.task, metric, sample) for _, sample in rows]
            items[spec.task] = ItemScores.of(
                scores,
                (f"{name} {sample['doc_id']} {sample['doc_hash']}" for name, sample in rows),
                category=spec.category,
                clusters=_clusters(spec, [sample["doc"] for _, sample in rows]),
            )
            samples[spec.task] = [_readable(sample, score) for (_, sample), score in zip(rows, scores, strict=True)]
            if metric in ("bleu", "chrf", "ter"):
                by_filter = found["results"][spec.task]
                corpus[spec.task] = next(v for k, v in by_filter.items() if k.split(",")[0] == metric)
        return Capability(items, prompts.hexdigest()[:16], samples, corpus)


def _chosen(spec: TaskSpec, name: str, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The samples of the filter that counts, in the order of the items."""
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    if spec.filter and spec.filter not in filters:
        raise DataError(f"task {name}: has no filter {spec.filter!r}: give one of {', '.join(filters)}")
    wanted = spec.filter or filters[0]
    return sorted((s for s in samples if s["filter"] == wanted), key=lambda sample: sample["doc_id"])


def item_score(task: str, metric: str, sample: Mapping[str, Any]) -> float:
    """One number for one item: metrics of several values are averaged, BLEU becomes sentence BLEU / 100.

    Raises:
        DataError: the task has no such metric, or it is no number an item.
    """
    if metric not in sample:
        raise DataError(f"task {task}: has no metric {metric!r}: give one of {', '.join(sample['metrics'])}")
    value = sample[metric]
    if metric in ("bleu", "chrf"):
        import sacrebleu

        reference, said = value
        references = [reference] if isinstance(reference, str) else list(reference)
        sentence = sacrebleu.sentence_bleu if metric == "bleu" else sacrebleu.sentence_chrf
        return float(sentence(said if isinstance(said, str) else said[0], references).score) / 100
    if isinstance(value, list | tuple) and value and all(isinstance(each, bool | int | float) for each in value):
        return sum(map(float, value)) / len(value)
    try:
        return float(value)
    except (TypeError, ValueError):
        mend = "choose one that is a number for each item"
        raise DataError(f"task {task}: metric {metric!r} gives {value!r}: {mend}") from None


def _clusters(spec: TaskSpec, docs: list[Mapping[str, Any]]) -> list[object] | None:
    if spec.ours is not None:
        rows = [json.loads(doc["row"]) for doc in docs]
        cluster = (lambda row: row.get(spec.cluster)) if spec.cluster else spec.ours.cluster
    else:
        rows, cluster = [dict(doc) for doc in docs], (lambda row: row.get(spec.cluster)) if spec.cluster else None
    if cluster is None:
        return None
    groups = [cluster(row) for row in rows]
    if any(group is None for group in groups):
        raise DataError(f"task {spec.task}: cluster={spec.cluster!r} is no column: give one of {', '.join(rows[0])}")
    return [str(group) for group in groups]


def _readable(sample: Mapping[str, Any], score: float) -> dict[str, Any]:
    argument = sample["arguments"][0]
    return {
        "item": sample["doc_id"],
        "prompt": argument[0],
        "target": sample["target"],
        "answer": sample["filtered_resps"] if len(sample["filtered_resps"]) > 1 else sample["filtered_resps"][0],
        "score": score,
    }


@contextlib.contextmanager
def _seeds() -> Iterator[None]:
    """The global seeds that lm-evaluation-harness sets, and afterwards the state as it was."""
    import numpy
    import torch

    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        random.seed(0)
        numpy.random.seed(FEWSHOT_SEED)
        torch.manual_seed(FEWSHOT_SEED)
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])


@contextlib.contextmanager
def _decoding_of_the_suite(model: PreTrainedModel) -> Iterator[None]:
    """Without what a checkpoint carries: its ``max_new_tokens`` or ``repetition_penalty`` would win over the suite's.

    Two models would then be compared under two decodings.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    tokens = {name: getattr(own, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**tokens)
    try:
        yield
    finally:
        model.generation_config = own
