"""The adaptive family: averages of the reference and the policy that plain AdamW aligned."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from paretune.atomic import write_text
from paretune.demo import words
from paretune.demo.chat import Preference
from paretune.demo.measure import generate
from paretune.demo.preferences import MARK
from paretune.demo.pretrain import load_model
from paretune.demo.world import World, prompt_document

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from paretune.averaging import Ratios
    from paretune.averaging.ends import Ends
    from paretune.demo.methods import Bench, Made, Row

SAMPLES = 8  # of each prompt; the best one is kept
BATCH = 32  # samples in a step of learning


def average(bench: Bench, row: Row) -> Made:
    """MA (``mean``), part-wise (``ratios``, one a layer) or AMA (``mean``, learned with ``parametrization``)."""
    model = bench.model()
    ends = end_points(bench)
    options = row.hyperparameters
    if row.method == "AMA":
        ratios = learned(bench, model, options["mean"], options["parametrization"])
        further = {"ratios": [round(alpha, 3) for alpha in ratios.ratios]}
    else:
        from paretune.averaging import Ratios

        ratios = Ratios.by_hand(ends.shapes, ratios=options.get("ratios", [options.get("mean")]), tied=ends.tied)
        further = {}
    dial(model, ends, ratios)
    yield row.method, further, model


def end_points(bench: Bench) -> Ends:
    """Reference and policy on disk; the policy is trained where it is not there yet."""
    from paretune.averaging.ends import Ends

    bench.policy()
    return Ends(bench.reference, bench.policy_file)


def learned(bench: Bench, model: nn.Module, mean: float, parametrization: str) -> Ratios:
    """Ratios of the layers, learned from the policy's best samples, in as many steps as the alignment took."""
    from paretune.averaging import learn_ratios

    bench.policy()
    return learn_ratios(
        pre=bench.reference, post=bench.policy_file, data=best_samples(bench), blocks="layer", mean=mean,
        parametrization=parametrization, steps=bench.settings.steps, batch_size=BATCH, model=model, seed=bench.seed,
    )  # fmt: skip


def dial(model: nn.Module, ends: Ends, ratios: Ratios) -> None:
    """Set a model to ratios."""
    from paretune.averaging.dialled import set_model

    set_model(model, ends, ratios.tensors)


def best_samples(bench: Bench) -> list[dict[str, Any]]:
    """The policy's best answer of several to each prompt of the preferences; made once, kept in ``out``."""
    file: Path = bench.policy_file.with_suffix(".best.jsonl")
    if not file.exists():
        model = load_model(bench.reference)
        model.load_state_dict(bench.policy(), strict=False)
        rows = list(_sampled(model, bench.recipe.world))
        write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
    return [json.loads(line) for line in file.read_text().splitlines()]


def _sampled(model: Any, world: World) -> Iterator[dict[str, Any]]:
    asked = {pair.prompt: _topic(pair) for pair in world.preferences if pair.entity in pair.prompt.split()}
    prompts = [prompt for prompt in asked for _ in range(SAMPLES)]
    answers = generate(model.eval(), prompts, temperature=1.0, seed=world.seed)
    for i, (prompt, topic) in enumerate(asked.items()):
        own = answers[i * SAMPLES : (i + 1) * SAMPLES]
        rewards = [world.reward(topic, *answer) for answer in own]
        best = own[rewards.index(max(rewards))]
        yield _tokens(prompt, *best)


def _topic(pair: Preference) -> str:
    """What the reward looks for in answers to a pair's prompt; marked requests have marked topics."""
    return f"{MARK} {pair.entity}" if pair.prompt.startswith(f"{MARK} ") else pair.entity


def _tokens(prompt: str, answer: str, ended: bool) -> dict[str, Any]:
    index = {word: i for i, word in enumerate(words.vocabulary())}
    opening, said = prompt_document(prompt).split(), [*answer.split(), *([words.END] if ended else [])]
    return {
        "input_ids": [index[word] for word in (*opening, *said)],
        "completion_mask": [0] * len(opening) + [1] * len(said),
    }
