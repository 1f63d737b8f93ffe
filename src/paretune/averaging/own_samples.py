"""What a model says by itself, as the Fisher gate's sequences: plain text, and questions with their answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError, DataError
from ..generation import Decoding, generate
from ..generation.template import Template, beginning

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def own_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int = 192,
    *,
    max_tokens: int = 64,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> list[dict[str, list[int]]]:
    """Samples of a model at temperature 1, tokenised: half plain text, half user turns with the model's answers.

    User turns are continued from the chat template's bare user mark; where the model makes none that end (its SFT
    masked the prompts), its own plain text stands in their place. Everything after the first mark counts.

    Args:
        model: the reference.
        tokenizer: with a chat template.
        count: of samples, at least 2; 32 nearly suffice, 192 is safe.
        max_tokens: the longest text, turn or answer.
        seed: of the sampling.
        batch_size: samples at once.
        progress: show a bar where stderr is a terminal.

    Returns:
        ``{"input_ids", "completion_mask"}`` rows.

    Raises:
        ArgumentError: a turn and its answer do not fit the model.
        DataError: the model says nothing.
    """
    if count < 2:
        raise ArgumentError("count", count, "give at least 2 samples: plain text and a user turn")
    template, start = Template.of(tokenizer), beginning(tokenizer)

    def sample(prompts: list[list[int]], *, stop: tuple[str, ...] = ()) -> list[Any]:
        decoding = Decoding(max_tokens, temperature=1.0, seed=seed, batch_size=batch_size, stop=stop)
        return generate(model, prompts, decoding, tokenizer, progress=progress)

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    plain = [(ids(each.text), end if each.finished else []) for each in sample([[start]] * ((count + 1) // 2))]
    rows = [_row([start], said + closed) for said, closed in plain if said]
    turns = [ids(each.text) for each in sample([list(template.before)] * (count // 2), stop=template.stops)
             if each.finished and each.text.strip()]  # fmt: skip
    if not turns:
        turns = [said for said, _ in plain if said]
    if not turns:
        raise DataError("the model says nothing after its start mark or its user mark: give samples of your own")
    asked = [[*template.before, *turn, *template.after] for turn in turns]
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, asked))
    if room is not None and longest + max_tokens > room:
        mend = (
            f"a turn of {longest} tokens and its answer exceed the model's {room}: half of that less the marks is safe"
        )
        raise ArgumentError("max_tokens", max_tokens, mend)
    for prompt, answer in zip(asked, sample(asked), strict=True):
        said = prompt[len(template.before) :] + ids(answer.text) + (end if answer.finished else [])
        rows.append(_row(list(template.before), said))
    return rows


def _row(given: list[int], said: list[int]) -> dict[str, list[int]]:
    return {"input_ids": given + said, "completion_mask": [0] * len(given) + [1] * len(said)}
