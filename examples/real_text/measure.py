"""Answer perplexity and preference accuracy on held-out rows, with intervals paired against the reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prepare import Sizes, read_rows

_BATCH_TOKENS = 8192
_RESAMPLES = 2000

Encoded = list[tuple[list[int], list[int]]]  # (prompt tokens, answer tokens)


def measure(out: Path, names: list[str], sizes: Sizes, seed: int) -> dict[str, dict[str, Any]]:
    """Measure models against ``reference``.

    Intervals are percentile bootstraps over questions (two pairs may share one); a model and the reference are
    resampled together.

    Args:
        out: of the run; ``names`` are its sub-directories.
        names: what to measure; ``base`` is measured as plain text, which is how it was trained, and without pairs.
        sizes: how many training pairs to look at.
        seed: of the bootstrap.
    """
    tokenizer = _tokenizer(out)
    answers = read_rows(out / "data" / "held_answers.jsonl")
    pairs = {
        "held_out": read_rows(out / "data" / "held_pairs.jsonl"),
        "train": read_rows(out / "data" / "dpo.jsonl")[: sizes.train_pairs],
    }
    raw: dict[str, dict[str, np.ndarray]] = {}
    for name in ["reference", *(name for name in names if name != "reference")]:
        model = _load(out / name)
        as_text = name == "base"
        nll, tokens = answer_nll(model, encode(tokenizer, answers, "completion", as_text))
        raw[name] = {"nll": nll, "tokens": tokens}
        for part, rows in pairs.items() if not as_text else ():
            chosen, rejected = (answer_nll(model, encode(tokenizer, rows, side))[0] for side in ("chosen", "rejected"))
            raw[name][part] = rejected - chosen  # log p(chosen) - log p(rejected)
    questions = [row["prompt"][0]["content"] for row in pairs["held_out"]]
    return {name: _summary(name, raw, questions, seed) for name in names}


def encode(tokenizer: Any, rows: list[dict[str, Any]], answer: str, as_text: bool = False) -> Encoded:
    """Prompt and answer tokens of conversational rows; the answer's tokens are the same in both forms."""
    made = []
    for row in rows:
        question, reply = row["prompt"][0]["content"], row[answer][0]["content"]
        prompt = (
            tokenizer.encode(question + "\n")
            if as_text
            else tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        )
        made.append((prompt, [*tokenizer.encode(reply), tokenizer.eos_token_id]))
    return made


@torch.no_grad()
def answer_nll(model: Any, encoded: Encoded) -> tuple[np.ndarray, np.ndarray]:
    """Negative log-likelihood of each answer given its prompt, in nats, and its number of tokens."""
    nll, tokens = np.zeros(len(encoded)), np.array([len(answer) for _, answer in encoded], dtype=float)
    order = sorted(range(len(encoded)), key=lambda i: sum(map(len, encoded[i])))
    while order:
        longest = sum(map(len, encoded[order[-1]]))
        batch = [order.pop() for _ in range(min(len(order), max(1, _BATCH_TOKENS // longest)))]
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for row, i in enumerate(batch):
            prompt, answer = encoded[i]
            ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        # Padding is on the right and attention is causal: no answer sees it.
        logits, targets = model(input_ids=ids).logits[:, :-1], labels[:, 1:]
        losses = torch.zeros(targets.shape)
        asked = targets != -100
        losses[asked] = torch.nn.functional.cross_entropy(logits[asked], targets[asked], reduction="none")
        nll[batch] = losses.sum(1).double().numpy()
    return nll, tokens


def interval(
    columns: list[np.ndarray], statistic: Callable[..., Any], clusters: list[str] | None, seed: int
) -> tuple[float, float, float]:
    """A statistic of column sums with its 95% bootstrap interval.

    Args:
        columns: one value a row each.
        statistic: of the columns' sums, element by element.
        clusters: which rows are drawn together; None draws single rows.
        seed: of the resamples: the same rows for every model.
    """
    rows = np.stack(columns, axis=1).astype(float)
    if clusters is not None:
        numbers = np.unique(clusters, return_inverse=True)[1]
        sums = np.zeros((numbers.max() + 1, rows.shape[1]))
        np.add.at(sums, numbers, rows)
        rows = sums
    times = np.random.default_rng(seed).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=_RESAMPLES)
    low, high = np.percentile(statistic(*(times @ rows).T), [2.5, 97.5])
    return float(statistic(*rows.sum(0))), float(low), float(high)


def _summary(name: str, raw: dict[str, dict[str, np.ndarray]], questions: list[str], seed: int) -> dict[str, Any]:
    own, reference = raw[name], raw["reference"]
    answers = [own["nll"], own["tokens"]]
    found: dict[str, Any] = {
        "perplexity": interval(answers, lambda nll, tokens: np.exp(nll / tokens), None, seed),
        "perplexity_ratio": interval(
            [*answers, reference["nll"]], lambda nll, tokens, before: np.exp((nll - before) / tokens), None, seed
        ),
    }
    if "held_out" not in own:
        return found
    right, right_before, one = own["held_out"] > 0, reference["held_out"] > 0, np.ones(len(questions))
    found["accuracy"] = interval([right, one], lambda hits, rows: hits / rows, questions, seed)
    found["accuracy_change"] = interval(
        [right, right_before, one], lambda hits, before, rows: (hits - before) / rows, questions, seed
    )
    found["accuracy_train"] = float((own["train"] > 0).mean())
    if name != "reference":  # against itself every margin is 0
        margin = own["held_out"] - reference["held_out"]
        found["margin_accuracy"] = interval([margin > 0, one], lambda hits, rows: hits / rows, questions, seed)
        found["margin_accuracy_train"] = float((own["train"] - reference["train"] > 0).mean())
    return found


def _tokenizer(out: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(out / "tokenizer")


def _load(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
