"""Best-of-n samples of the aligned model: what adaptive averaging learns from."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..atomic import write_text
from ..errors import ArgumentError, DataError
from ..generation import Decoding, Endpoint, Generation, generate, load
from ..generation.prompts import read_questions, read_rows
from ..generation.store import Store
from ..log import get

if TYPE_CHECKING:
    from datasets import Dataset

Reward = Callable[..., Any]
_SCORED = 64  # samples that are scored between two writes
_logger = get("averaging")


class _Item(NamedTuple):
    """What the rewards of `paretune.evaluation` score."""

    prompt: Any
    answer: str
    other: str | None = None


def collect_best_of_n(
    model: Any,
    prompts: Sequence[Any] | str | os.PathLike[str],
    reward: Reward | str | os.PathLike[str],
    n: int = 8,
    *,
    keep: int = 1,
    threshold: float | None = None,
    top_share: float = 1.0,
    deduplicate: bool = True,
    finished_only: bool = False,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop: Sequence[str] = (),
    seed: int = 0,
    batch_size: int = 8,
    tokenizer: Any = None,
    out: str | os.PathLike[str] | None = None,
    reward_name: str | None = None,
    progress: bool = True,
) -> Dataset:
    """Sample n completions of each prompt, score them, keep the best.

    Args:
        model: the aligned model, its path, or an `Endpoint`.
        prompts: each is text (continued as it stands) or a list of messages; or rows with such a ``prompt``; or a
            file of them as ``paretune average collect`` reads it.
        reward: a function as TRL calls it, ``reward(prompts=…, completions=…) -> list of numbers`` (completions of
            conversations are lists of one message); or one of a single argument, which gets all completions as
            texts; or a reward of `paretune.evaluation` that scores one answer by itself, such as a reward model; or a
            file of JSON lines with ``score``, ``index`` and ``sample`` of every sample.
        n: samples a prompt.
        keep: how many of each prompt's samples are kept, at most.
        threshold: samples that score less are not kept.
        top_share: of all that would be kept, this share with the highest scores, in (0, 1].
        deduplicate: of equal completions of a prompt only the first counts.
        finished_only: leave out samples that were cut at ``max_new_tokens``.
        max_new_tokens, temperature, top_p, top_k, stop, seed, batch_size: of the sampling, see `Decoding`.
        tokenizer: of a model given as an object; by default that of the path it was loaded from.
        out: the JSON lines to write, in a form that TRL reads. Beside it ``NAME.samples.jsonl`` keeps all samples and
            ``NAME.scores.jsonl`` their scores; an interrupted call, repeated, makes and scores only what is missing.
        reward_name: what tells rewards apart when a call is repeated; by default the reward's name, with a hash of a
            function's code.
        progress: show bars on stderr where that is a terminal.

    Returns:
        Rows with ``prompt``, ``completion``, ``score``, ``index``, ``sample`` and ``finished``, in the prompts' order.

    Raises:
        ArgumentError: an argument cannot work, or the files beside ``out`` belong to another call.
        DataError: a score is missing or no finite number, or nothing is left to keep.

    Reference: arXiv 2309.06256, section 5 (its samples are RAFT's, arXiv 2304.06767: best of n by reward).

    Example:
        >>> import torch, transformers
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> words = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "b": 2}, unk_token="<eos>"))
        >>> words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        >>> tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=3, eos_token_id=0, **sizes))
        >>> rows = collect_best_of_n(
        ...     model, ["a b", "b"], lambda prompts, completions: [c.count("a") for c in completions],
        ...     n=4, max_new_tokens=6, tokenizer=tokenizer, progress=False,
        ... )
        >>> rows["prompt"][:]
        ['a b', 'b']
    """
    from datasets import Dataset

    if hasattr(reward, "forward") or not (callable(reward) or isinstance(reward, str | os.PathLike)):
        raise ArgumentError(
            "reward",
            reward,
            "give a function, a file of scores, or paretune.evaluation.reward.load_reward('model:PATH')",
        )
    _check(n, keep, threshold, top_share)
    decoding = Decoding(max_new_tokens, temperature, top_p, top_k, n, seed, batch_size, tuple(stop))
    files = _files(out)
    if isinstance(prompts, str | os.PathLike) and isinstance(model, str | os.PathLike):
        model, tokenizer = load(str(model))  # whether prompts become conversations is the tokenizer's to say
    elif tokenizer is None and not isinstance(model, str | os.PathLike | Endpoint):
        tokenizer = _tokenizer_of(model)
    chat = isinstance(model, Endpoint) or bool(getattr(tokenizer, "chat_template", None))
    prompts = _prompts(prompts, chat=chat)
    samples = generate(model, prompts, decoding, tokenizer, files["samples"], progress=progress)
    scores: list[float | None]
    if callable(reward):
        scores = _scored(samples, reward, reward_name or _name(reward), files["scores"], progress)
    else:
        scores = list(_read_scores(samples, reward))
    kept = best(samples, scores, keep, threshold, top_share, deduplicate=deduplicate, finished_only=finished_only)
    if not kept:
        raise DataError("reward: no sample is good enough to be kept: lower threshold or sample more")
    rows = [_row(samples[i], scores[i]) for i in kept]
    if out is not None:
        write_text(Path(out), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return Dataset.from_list(rows)


def best(
    samples: Sequence[Generation],
    scores: Sequence[float | None],
    keep: int = 1,
    threshold: float | None = None,
    top_share: float = 1.0,
    *,
    deduplicate: bool = True,
    finished_only: bool = False,
) -> list[int]:
    """Which samples are kept, prompt by prompt, the best first; of equal scores the earlier sample.

    Args:
        samples, scores: of all prompts; a sample without a score is not kept.
        keep, threshold, top_share, deduplicate, finished_only: see `collect_best_of_n`.
    """
    scored = {i: value for i, value in enumerate(scores) if value is not None}
    order = sorted(scored, key=lambda i: (samples[i].index, -scored[i], samples[i].sample))
    kept: list[int] = []
    seen: set[tuple[int, str]] = set()
    count: dict[int, int] = {}
    for i in order:
        sample = samples[i]
        text = sample.index, sample.text.strip()
        if (threshold is not None and scored[i] < threshold) or (finished_only and not sample.finished):
            continue
        if count.get(sample.index, 0) >= keep or (deduplicate and text in seen):
            continue
        seen.add(text)
        count[sample.index] = count.get(sample.index, 0) + 1
        kept.append(i)
    if top_share < 1:
        ranked = sorted(kept, key=lambda i: (-scored[i], samples[i].index, samples[i].sample))
        chosen = set(ranked[: max(1, round(top_share * len(kept)))]) if kept else set()
        kept = [i for i in kept if i in chosen]
    return kept


def _check(n: int, keep: int, threshold: float | None, top_share: float) -> None:
    for name, value in (("n", n), ("keep", keep)):
        if type(value) is not int or value < 1:
            raise ArgumentError(name, value, "must be a positive number of samples")
    if keep > n:
        raise ArgumentError("keep", keep, f"only n={n} samples are made of each prompt")
    if not 0 < top_share <= 1:
        raise ArgumentError("top_share", top_share, "must be in (0, 1]")
    if threshold is not None and math.isnan(threshold):
        raise ArgumentError("threshold", threshold, "must be a number")


def _tokenizer_of(model: Any) -> Any:
    """The tokenizer beside a loaded model's weights; None where it was not loaded from a path."""
    from transformers import AutoTokenizer

    path = getattr(getattr(model, "config", None), "_name_or_path", "")
    try:
        return AutoTokenizer.from_pretrained(path) if path else None
    except (OSError, ValueError) as error:
        raise ArgumentError("tokenizer", None, f"{path!r} has none ({type(error).__name__}): give it") from None


def _prompts(prompts: Any, *, chat: bool) -> list[Any]:
    """Texts and conversations, of a file or of rows."""
    if isinstance(prompts, str | os.PathLike):
        return list(read_questions(prompts, chat=chat).prompts)
    found = list(prompts)
    for index, row in enumerate(found):
        if isinstance(row, Mapping):
            if not row.get("prompt"):
                raise ArgumentError(f"prompts[{index}]", dict(row), "give text, messages, or rows with prompt")
            found[index] = row["prompt"]
        elif not isinstance(row, str) and row and isinstance(row[0], int):
            raise ArgumentError(f"prompts[{index}]", row, "give text or messages: TRL reads no rows of token ids")
    return found


def _files(out: str | os.PathLike[str] | None) -> dict[str, Path | None]:
    if out is None:
        return {"samples": None, "scores": None}
    path = Path(out)
    if path.suffix != ".jsonl" or path.is_dir():
        raise ArgumentError("out", str(out), "name a file that ends in .jsonl")
    return {what: path.with_suffix(f".{what}.jsonl") for what in ("samples", "scores")}


def _scored(
    samples: Sequence[Generation], reward: Reward, name: str, file: Path | None, progress: bool
) -> list[float | None]:
    """Scores of all samples; those in the file are not made again."""
    from tqdm import tqdm

    keys = [_key(sample, name) for sample in samples]
    failed = 0
    with Store(file, "scores") as store:
        strangers = {row["reward"] for row in store.rows.values() if row.get("reward") != name}
        if strangers:
            raise ArgumentError("reward", name, f"{file} holds scores of {min(strangers)}: name another out")
        waiting = list(dict(zip(keys, samples, strict=True)).items())
        waiting = [(key, sample) for key, sample in waiting if key not in store.rows]
        done = len(samples) - len(waiting)
        with tqdm(total=len(samples), initial=done, unit="score", disable=None if progress else True) as bar:
            for start in range(0, len(waiting), _SCORED):
                part = waiting[start : start + _SCORED]
                values = _call(reward, [sample for _, sample in part])
                store.append(
                    {"key": key, "reward": name, "index": s.index, "sample": s.sample, "score": value}
                    for (key, s), value in zip(part, values, strict=True)
                    if value is not None  # asked for again when the call is repeated
                )
                failed += sum(value is None for value in values)
                bar.update(len(part))
        if failed:
            _logger.warning("%d of %d samples could not be scored: they are not kept", failed, len(samples))
        return [store.rows[key]["score"] if key in store.rows else None for key in keys]


def _call(reward: Reward, samples: Sequence[Generation]) -> list[float | None]:
    prompts = [sample.prompt for sample in samples]
    completions = [_completion(sample) for sample in samples]
    if hasattr(reward, "pairwise"):
        if reward.pairwise:
            raise ArgumentError("reward", _name(reward), "compares two answers: give one that scores an answer alone")
        values = reward([_Item(sample.prompt, sample.text) for sample in samples])
    else:
        known = _parameters(reward)
        given = {"prompts": prompts, "completions": completions}
        given = {name: value for name, value in given.items() if known is None or name in known}
        if "completions" in given:
            values = reward(**given)
        elif known is not None and len(known) == 1:
            values = reward([sample.text for sample in samples])
        else:
            values = reward(prompts, completions)
    found = list(values) if isinstance(values, Iterable) else [values]
    if len(found) != len(samples):
        raise DataError(f"reward: gave {len(found)} scores for {len(samples)} samples: give one for each")
    return [None if value is None else _finite(value, sample) for value, sample in zip(found, samples, strict=True)]


def _parameters(reward: Reward) -> set[str] | None:
    """The names of a function's parameters; None where it takes any."""
    try:
        parameters = inspect.signature(reward).parameters
    except (TypeError, ValueError):  # some built-in functions have none
        return set()
    return None if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) else set(parameters)


def _finite(value: Any, sample: Generation) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise DataError(
            f"reward: gives sample {sample.sample} of prompt {sample.index} {value!r}: give a finite number, or None"
        )
    return found


def _read_scores(samples: Sequence[Generation], path: str | os.PathLike[str]) -> list[float]:
    by_place: dict[tuple[Any, Any], float] = {}
    for number, row in enumerate(read_rows(path, "scores"), 1):
        if not isinstance(row.get("score"), int | float) or isinstance(row["score"], bool):
            raise DataError(f"scores={str(path)!r}: row {number} has no number in score")
        by_place[row.get("index"), row.get("sample")] = float(row["score"])
    missing = [sample for sample in samples if (sample.index, sample.sample) not in by_place]
    if missing:
        first = missing[0]
        raise DataError(
            f"scores={str(path)!r}: lacks {len(missing)} of {len(samples)} samples (first: index {first.index}, "
            f"sample {first.sample}): score every row of the samples' file"
        )
    return [_finite(by_place[sample.index, sample.sample], sample) for sample in samples]


def _row(sample: Generation, score: float | None) -> dict[str, Any]:
    return {
        "prompt": sample.prompt,
        "completion": _completion(sample),
        "score": score,
        "index": sample.index,
        "sample": sample.sample,
        "finished": sample.finished,
    }


def _completion(sample: Generation) -> Any:
    """As TRL has it: text after text, a message after messages."""
    return sample.text if isinstance(sample.prompt, str) else [{"role": "assistant", "content": sample.text}]


def _key(sample: Generation, reward: str) -> str:
    text = json.dumps([reward, sample.index, sample.sample, sample.prompt, sample.text], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _name(reward: Reward) -> str:
    """What tells a reward apart: its name, and of functions also a hash of what they do."""
    name = getattr(reward, "name", None) or (
        f"{getattr(reward, '__module__', '')}.{getattr(reward, '__qualname__', type(reward).__qualname__)}"
    )
    code = getattr(getattr(reward, "function", reward), "__code__", None)
    if code is None:
        return str(name)
    return f"{name} {hashlib.sha256(repr(_content(code)).encode()).hexdigest()[:8]}"


def _content(code: Any) -> list[Any]:
    """What a function's code does, without where it stands."""
    constants = [
        _content(c) if hasattr(c, "co_code") else sorted(map(repr, c)) if isinstance(c, frozenset) else repr(c)
        for c in code.co_consts
    ]
    return [code.co_code, constants, code.co_names]
