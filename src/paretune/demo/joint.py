"""The joint family: SFT's dialogues and the preference pairs in one run, by the schedules of `paretune`.

The loop is the demo's own; the schedules and the order of rows are the package's, and a test shows it equal to
`paretune.JointTrainer`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from paretune.demo.align import DPOSettings, PairTensors, _preference_loss, adamw
from paretune.demo.rehearse import encode
from paretune.demo.world import World

if TYPE_CHECKING:
    from torch import Tensor, nn

    from paretune.demo.methods import Bench, Made, Row
    from paretune.training.schedules import Schedule

DIALOGUES = 2000
REFRESH_EVERY = 10


def joint(bench: Bench, row: Row) -> Made:
    """One run of a schedule: ``weight`` is the preference objective's, ``order`` that of a sequential run.

    A schedule that trains one objective a step gets twice the steps, so that at weight 0.5 the pairs have as many as
    in plain alignment, and every row costs about the same.
    """
    from dataclasses import replace

    model, settings = bench.model(), bench.settings
    if row.method != "MIX":
        settings = replace(settings, steps=2 * settings.steps)
    dialogues = sft_dialogues(bench.recipe.world)
    schedule = make_schedule(row, model, dialogues)
    counts: dict[str, int] = {}
    for record in train(model, dialogues, bench.pairs, schedule, settings):
        for name in record:
            counts[name] = counts.get(name, 0) + 1
    yield row.method, {"steps": counts}, model


def sft_dialogues(world: World) -> tuple[Tensor, Tensor]:
    """Dialogues as SFT had them: ids and completion marks, padded on the right."""
    drawn = islice(world.dialogues("joint"), DIALOGUES)
    return encode([(turns[0]["content"], turns[1]["content"]) for turns in drawn])


def make_schedule(row: Row, model: nn.Module, dialogues: tuple[Tensor, Tensor]) -> Schedule:
    """The row's schedule; MAXRIGHT's ideal SFT loss is the reference's, its ideal preference loss 0."""
    import torch

    from paretune.training.schedules import Alright, MaxRight, Mix, Sequential

    if "order" in row.hyperparameters:
        return Sequential(row.hyperparameters["order"].split(" then "), [0.5, 0.5])
    weight = row.hyperparameters["weight"]
    weights = {"sft": 1 - weight, "dpo": weight}
    if row.method == "MIX":
        return Mix(weights)
    if row.method == "ALRIGHT":
        return Alright(weights)
    with torch.no_grad():
        ideal = float(_sft_loss(model, *(part[:256] for part in dialogues)))
    return MaxRight(weights, {"sft": ideal}, REFRESH_EVERY)


def train(
    model: nn.Module,
    dialogues: tuple[Tensor, Tensor],
    pairs: PairTensors,
    schedule: Schedule,
    settings: DPOSettings,
) -> Iterator[dict[str, float]]:
    """Train ``model`` in place; yields the losses that each step descended.

    Args:
        model: starts at the reference.
        dialogues: ids and completion marks, from :func:`sft_dialogues`.
        pairs: with the reference's log-probabilities.
        schedule: of the objectives ``sft`` and ``dpo``.
        settings: of the run; a batch holds as many dialogues as pairs.
    """
    import torch

    from paretune.training.draws import Draws

    rows = {"sft": len(dialogues[0]), "dpo": len(pairs.ids)}
    draws = {name: Draws(name, count, settings.batch, settings.seed) for name, count in rows.items()}
    schedule.bind({name: each.steps(1) for name, each in draws.items()}, settings.seed)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = adamw(trained, settings)
    values: dict[str, float] = {}

    def loss(name: str) -> Tensor:
        at = draws[name].at(draws[name].taken)
        if name == "dpo":
            return _preference_loss(model, pairs.take(at), settings)
        return _sft_loss(model, *(part[at] for part in dialogues))

    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        if schedule.measures(step):
            with torch.no_grad():
                values |= {name: float(loss(name)) for name in rows}
        optimizer.zero_grad(set_to_none=True)
        descended = {}
        for name, coefficient in schedule.choose(step, settings.steps, values).items():
            value = loss(name)
            (coefficient * value).backward()
            descended[name] = value.item()
            draws[name].taken += 1
        values |= descended
        torch.nn.utils.clip_grad_norm_([p for _, p in trained], settings.clip)
        optimizer.step()
        yield descended


def _sft_loss(model: Any, ids: Tensor, completion: Tensor) -> Tensor:
    from paretune.training.logps import token_logps

    width = int(completion.any(0).nonzero().max()) + 1
    return -token_logps(model, ids[:, :width], completion[:, :width])[0].mean()
