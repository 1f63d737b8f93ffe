"""What a chat template writes around the user's words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import ArgumentError

_SENTINEL = "zyxwv"


@dataclass(frozen=True)
class Template:
    """The parts of a chat template around what the user says.

    Args:
        before: token ids up to the user's text.
        after: token ids from there to where the answer begins.
        stops: texts that show that the user's turn is over.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    stops: tuple[str, ...]

    @classmethod
    def of(cls, tokenizer: Any) -> Template:
        """Read a tokenizer's template off a rendered conversation.

        Raises:
            ArgumentError: there is no template, or it does not show the user's text.
        """
        if not tokenizer.chat_template:
            raise ArgumentError("tokenizer", type(tokenizer).__name__, "has no chat template: set one")
        turn = [{"role": "user", "content": _SENTINEL}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        before, found, after = text.partition(_SENTINEL)
        if not found:
            raise ArgumentError("tokenizer", type(tokenizer).__name__, "its chat template drops the user's text")
        ids = [tokenizer(part, add_special_tokens=False).input_ids for part in (before, after)]
        special = {tokenizer.convert_tokens_to_ids(token): token for token in tokenizer.all_special_tokens}
        first = [special[token] for token in ids[1][:1] if token in special]
        # A template without a special token ends the turn by text: its first line that says anything.
        stops = first or [line.strip() for line in after.splitlines() if line.strip()][:1]
        return cls(tuple(ids[0]), tuple(ids[1]), tuple(stops))


def beginning(tokenizer: Any) -> int:
    """The token that plain text begins with: the tokenizer's start mark, else its end mark.

    Raises:
        ArgumentError: it has neither.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ArgumentError("tokenizer", type(tokenizer).__name__, "has no token that text begins with")
    return int(start)
