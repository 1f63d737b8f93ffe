"""Joint training in plain torch: the oracle of `pt.JointTrainer`. No Trainer, no TRL, no function of paretune's."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch.nn import functional as F


def tokenise(tokenizer: Any, rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    def ids(messages: list[Any], **more: Any) -> list[int]:
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **more)["input_ids"]

    made = []
    for row in rows:
        prompt = row["messages"][:-1] if kind == "sft" else row["prompt"]
        start = len(ids(prompt, add_generation_prompt=True))
        answers = {"sft": lambda r: [r["messages"][-1:]], "kto": lambda r: [r["completion"]]}
        chosen = answers.get(kind, lambda r: [r["chosen"], r["rejected"]])(row)
        made.append({"start": start, "ids": [ids(prompt + answer) for answer in chosen], "label": row.get("label")})
    return made


def logps(model: Any, sequences: list[list[int]], starts: list[int]) -> list[torch.Tensor]:
    """Token log-probabilities of each completion, one sequence after the other: no padding at all."""
    found = []
    for ids, start in zip(sequences, starts, strict=True):
        given = torch.tensor([ids])
        every = model(input_ids=given).logits[0].log_softmax(-1)
        found.append(every[start - 1 : -1].gather(1, given[0, start:, None])[:, 0])
    return found


def sums(model: Any, rows: list[dict[str, Any]], side: int = 0) -> torch.Tensor:
    return torch.stack([x.sum() for x in logps(model, [r["ids"][side] for r in rows], [r["start"] for r in rows])])


def fixed(reference: Any, rows: list[dict[str, Any]], side: int) -> torch.Tensor:
    """What the reference says of each row: asked once, since it never changes."""
    for row in rows:
        if ("ref", side) not in row:
            with torch.no_grad():
                row["ref", side] = sums(reference, [row], side)
    return torch.cat([row["ref", side] for row in rows]).float().double()


def loss_of(kind: str, model: Any, reference: Any, rows: list[dict[str, Any]], others: Any, beta: float) -> Any:
    """(mean loss, what it is the mean over)"""
    if kind == "sft":
        tokens = torch.cat(logps(model, [r["ids"][0] for r in rows], [r["start"] for r in rows]))
        return -tokens.mean(), len(tokens)
    ref = [fixed(reference, rows, side) for side in range(len(rows[0]["ids"]))]
    if kind == "kto":
        with torch.no_grad():
            z = (sums(model, others) - fixed(reference, others, 0)).mean().clamp(min=0)
        ratio = sums(model, rows) - ref[0]
        sign = torch.tensor([1.0 if r["label"] else -1.0 for r in rows])
        return (1 - torch.sigmoid(beta * sign * (ratio - z))).mean(), len(rows)
    won, lost = (sums(model, rows, side) - ref[side] for side in (0, 1))
    if kind == "ipo":
        won, lost = (x / torch.tensor([len(r["ids"][s]) - r["start"] for r in rows]) for s, x in ((0, won), (1, lost)))
        return (won - lost - 1 / (2 * beta)).pow(2).mean(), len(rows)
    return -F.logsigmoid(beta * (won - lost)).mean(), len(rows)


def train(
    model: Any, reference: Any, data: dict[str, Any], schedule: str, weights: dict[str, float], *, order: Any,
    steps: int, micro: int, lr: float, seed: int, beta: float, refresh: int = 3, ideal: dict[str, float] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Train in place; ``order(name, number)`` gives the rows of a micro-batch. Returns one record a step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    names, taken, values, records = list(data), dict.fromkeys(data, 0), {}, []

    def batches(name: str) -> list[Any]:
        found = []
        for number in range(taken[name], taken[name] + micro):
            rows = order(name, number)
            picked = [data[name][row] for row in rows]
            found.append((name, picked, [data[name][row].get("other") for row in rows]))
        return found

    def value(batch: Any) -> Any:
        name, rows, others = batch
        return loss_of(name, model, reference, rows, others, beta)

    for step in range(steps):
        loss: dict[str, float] = {}
        if schedule == "maxright" and step % refresh == 0:
            with torch.no_grad():
                for name in names:
                    each = [value(batch) for batch in batches(name)]
                    values[name] = loss[name] = float(sum(x * n for x, n in each) / sum(n for _, n in each))
        stale = dict(values)
        if schedule == "mix":
            chosen = weights
        elif schedule == "alright":
            draw = int.from_bytes(hashlib.blake2b(f"{seed} {step}".encode(), digest_size=8).digest(), "big") / 2**64
            chosen = {names[0] if draw < weights[names[0]] else names[1]: 1.0}
        elif schedule == "maxright":
            chosen = {max(names, key=lambda n: weights[n] * (values[n] - (ideal or {}).get(n, 0.0))): 1.0}
        else:
            chosen = {schedule.split("-")[0 if step < steps / 2 else -1]: 1.0}
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        for name, weight in chosen.items():
            each = [value(batch) for batch in batches(name)]
            mean = sum(x * n for x, n in each) / sum(n for _, n in each)
            (weight * mean).backward()
            values[name] = loss[name] = mean.item()
            taken[name] += micro
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        objective = "mix" if len(chosen) > 1 else next(iter(chosen))
        records.append({"step": step + 1, "objective": objective, "loss": loss, "stale": stale})
    return records
