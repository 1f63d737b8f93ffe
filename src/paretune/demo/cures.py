"""Rows without any SFT data: self-rehearsal during training, the Fisher gate after it, and what they are judged by.

Each makes a whole ladder of scales s, θ(s) = θ_ref + s·(θ − θ_ref), so that all are compared at equal reward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from paretune.demo import words
from paretune.demo.align import align

if TYPE_CHECKING:
    from torch import Tensor, nn

    from paretune.averaging.fisher_gate import Gate
    from paretune.demo.methods import Bench, Made, Row

BACK = (0.3, 0.5, 0.7, 0.85)  # scaled back; 1 is the policy itself
LADDER = (0.4, 0.6, 0.8, 1.0)
GATED = (1.0, 1.5, 2.0, 3.0, 4.0)
TWICE = 2  # ALRIGHT halves the steps on preferences: it gets twice as many
FISHER_PAIRS, FISHER_SAMPLES = 160, 192


def scaled_back(bench: Bench, row: Row) -> Made:
    """Plain AdamW's policy, averaged with the reference."""
    yield from climbed(bench, row, bench.policy(), BACK)


def rehearsed(bench: Bench, row: Row) -> Made:
    """ALRIGHT at one half with self-rehearsal, or with real replay."""
    from paretune.demo.rehearse import real_replay, self_rehearsal

    model, world, source = bench.model(), bench.recipe.world, row.hyperparameters["source"]
    if source == "real data":
        beside = real_replay(world, bench.seed)
    else:
        beside = self_rehearsal(bench.model(), world, source, bench.seed)  # type: ignore[arg-type]
    settings = replace(bench.settings, steps=TWICE * bench.settings.steps)
    for _ in align(model, bench.pairs, settings, beside=beside):
        pass
    yield from climbed(bench, row, {name: p.detach().clone() for name, p in model.named_parameters()}, LADDER)


def gated(bench: Bench, row: Row) -> Made:
    """Plain AdamW's policy behind the Fisher gate."""
    gate = fisher_gate(bench, row.hyperparameters["weight"], row.hyperparameters.get("mode", "entries"))
    reference = dict(bench.model().named_parameters())
    policy = gate.merged(reference, bench.policy())
    yield from climbed(bench, row, policy, GATED, {"ratio": round(gate.ratio, 2), "refused": not gate.trusted})


def fisher_gate(bench: Bench, weight: float, mode: str = "entries") -> Gate:
    """The gate of a bench's reference, preferences and the reference's own samples."""
    from paretune.averaging.fisher_gate import fisher_gate as build
    from paretune.averaging.own_samples import own_samples

    model = bench.model()
    samples = own_samples(
        model, words.build_tokenizer(), FISHER_SAMPLES,  # type: ignore[arg-type]
        max_tokens=24, seed=bench.seed, batch_size=FISHER_SAMPLES, progress=False,
    )  # fmt: skip
    chosen = [
        {"input_ids": ids[: len(mask)], "completion_mask": mask}
        for ids, marks in zip(
            bench.pairs.ids[:FISHER_PAIRS, 0].tolist(), bench.pairs.completion[:FISHER_PAIRS, 0].tolist(), strict=True
        )
        for mask in (marks[: len(marks) - marks[::-1].index(True)],)  # without the padding
    ]
    return build(None, model, chosen, samples, weight, mode=mode, override=True)  # type: ignore[arg-type]


def climbed(
    bench: Bench, row: Row, policy: dict[str, Tensor], ladder: tuple[float, ...], further: dict[str, Any] | None = None
) -> Iterator[tuple[str, dict[str, Any], nn.Module]]:
    """The policy's change at each scale, in one model."""
    import torch

    model = bench.model()
    reference = {name: p.detach().clone() for name, p in model.named_parameters()}
    for scale in ladder:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(torch.lerp(reference[name], policy[name], scale))
        yield row.method, {"scale": scale, **(further or {})}, model
