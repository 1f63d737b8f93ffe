"""One model's reward and skills on held-out questions, paired with the reference's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import answer_nll, encode, interval
from prepare import read_rows
from rules import Rules, features, formatted, sums
from setting import Setting

import paretune as pt


class Judge:
    """Measures models; the first must be the reference, with which all others are paired.

    Args:
        out: of the run, prepared.
        tokenizer: of all models.
        setting: how much is measured.
        seed: of bootstraps and samples: the same questions and draws for every model.
    """

    def __init__(self, out: Path, tokenizer: Any, setting: Setting, seed: int) -> None:
        self.tokenizer, self.setting, self.seed = tokenizer, setting, seed
        held = read_rows(out / "data" / "held_answers.jsonl")
        pairs = read_rows(out / "data" / "held_pairs.jsonl")
        self.answers = encode(tokenizer, held, "completion")
        self.as_text = encode(tokenizer, held, "completion", as_text=True)
        self.sides = [encode(tokenizer, pairs, side) for side in ("chosen", "rejected")]
        self.clusters = [row["prompt"][0]["content"] for row in pairs]
        distinct = list({question: None for question in self.clusters})
        half = setting.questions // 2
        self.questions = [row["prompt"] for row in held[:half]]
        self.questions += [[{"role": "user", "content": question}] for question in distinct[:half]]
        self.rules = Rules.learnt(_texts(read_rows(out / "data" / "dpo.jsonl")))
        self.rules_accuracy = self.rules.accuracy(_texts(pairs))
        self.reference: dict[str, Any] = {}

    def base(self, model: Any) -> dict[str, Any]:
        """The base model's perplexity, read as plain text, which is how it was trained."""
        nll, tokens = answer_nll(model.eval(), self.as_text)
        return {"perplexity": float(np.exp(nll.sum() / tokens.sum()))}

    def __call__(self, model: Any) -> dict[str, Any]:
        """Means with 95% intervals: bootstraps over questions."""
        model.eval()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.setting.sizes.bf16):  # as in training
            nll, tokens = answer_nll(model, self.answers)
            chosen, rejected = (answer_nll(model, side)[0] for side in self.sides)
        decoding = pt.Decoding(self.setting.max_tokens, temperature=1.0, seed=self.seed, batch_size=self.setting.batch)
        said = pt.generate(model, self.questions, decoding, self.tokenizer, progress=False)
        texts = [each.text for each in said]
        raw: dict[str, Any] = {
            "nll": nll,
            "odds": rejected - chosen,  # log p(chosen) − log p(rejected)
            "texts": texts,
            "format": np.array([each.finished and formatted(each.text) for each in said], dtype=float),
        }
        self.reference = self.reference or raw
        before = self.reference
        margin = raw["odds"] - before["odds"]
        # An answer that did not end wins nothing.
        wins = np.array(
            [self.rules.preferred(own, other) * each.finished
             for own, other, each in zip(texts, before["texts"], said, strict=True)]
        )  # fmt: skip
        counted = np.array([sums(text) for text in texts])
        return {
            "perplexity": self._of([nll, tokens], lambda n, t: np.exp(n / t)),
            "ratio": self._of([nll - before["nll"], tokens], lambda n, t: np.exp(n / t)),
            "margin": self._mean(margin, self.clusters),
            "margin_accuracy": self._mean((margin > 0) + 0.5 * (margin == 0), self.clusters),
            "accuracy": self._mean(raw["odds"] > 0, self.clusters),
            "loss": float(np.mean(np.logaddexp(0, -self.setting.beta * margin))),
            "reward": self._mean(wins),
            "format": self._mean(raw["format"]),
            "format_change": self._mean(raw["format"] - before["format"]),
            "sums": self._of([counted[:, 1], counted[:, 0]], lambda right, n: right / np.maximum(n, 1)),
            "finished": float(np.mean([each.finished for each in said])),
            "features": np.mean([features(text) for text in texts], 0).round(3).tolist(),
            "characters": float(np.mean([len(text) for text in texts])),
        }

    def _mean(self, values: Any, clusters: list[str] | None = None) -> tuple[float, float, float]:
        return self._of([np.asarray(values, dtype=float), np.ones(len(values))], lambda v, n: v / n, clusters)

    def _of(self, columns: list[Any], statistic: Any, clusters: list[str] | None = None) -> tuple[float, float, float]:
        middle, low, high = interval(columns, statistic, clusters, self.seed)
        return round(middle, 4), round(low, 4), round(high, 4)


def _texts(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows]
