"""Answers by a model in this process: loading, encoding, batches and what becomes of their tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import refuse_gated_adapter
from ..errors import ArgumentError, CheckpointError
from .batch import write as _write
from .decoding import Decoding, Generation, Prompt, Request, prompt_kind


def load(path: str, *, dtype: str | torch.dtype = "auto", device: str | None = None) -> tuple[Any, Any]:
    """A causal language model and its tokenizer, ready to answer.

    Args:
        path: a directory, hub id, or PEFT adapter.
        dtype: of the weights; as stored by default.
        device: where to; the accelerator where there is one.

    Raises:
        CheckpointError: there is no such model, it lacks weights, or it has no tokenizer.
        ArgumentError: there is no such device.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_model(path)
    place = _device(device)
    causal: Any = AutoModelForCausalLM
    try:
        tokenizer = AutoTokenizer.from_pretrained(_tokenizer_home(path))
        model, found = causal.from_pretrained(path, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: cannot be loaded as a language model: {reason}") from error
    if found["missing_keys"]:
        raise CheckpointError(f"{path}: lacks the weights {sorted(found['missing_keys'])[:3]}: give a complete model")
    return model.to(place).eval(), tokenizer


def check_model(path: str) -> None:
    """Refuse what cannot be a model before any work starts; what is on the hub is seen when it is loaded.

    Args:
        path: a directory, hub id, or PEFT adapter.

    Raises:
        CheckpointError: there is no such directory, or it holds no configuration.
    """
    place = Path(path)
    if not place.exists() and (path.count("/") > 1 or path.startswith((".", "/", "~"))):
        raise CheckpointError(f"{path}: there is no such model: give a directory or a hub id")
    if place.exists() and not any((place / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise CheckpointError(f"{path}: holds no config.json: give the directory of a model")
    refuse_gated_adapter(place)


def _device(wanted: str | None) -> torch.device:
    if wanted is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(wanted)
    except RuntimeError:
        raise ArgumentError("device", wanted, "give cpu, cuda or cuda:N") from None
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ArgumentError("device", wanted, f"there are {torch.cuda.device_count()} GPUs: give cpu, or leave it out")
    return place


def _tokenizer_home(path: str) -> str:
    """Where the tokenizer is: an adapter may leave it with the model that it belongs to."""
    adapter = Path(path) / "adapter_config.json"
    if not adapter.is_file() or (Path(path) / "tokenizer_config.json").is_file():
        return path
    return str(json.loads(adapter.read_text())["base_model_name_or_path"])


def encode(prompts: Sequence[Prompt], tokenizer: Any, model: Any, decoding: Decoding) -> list[list[int]]:
    """Token ids of each prompt.

    Text gets the tokenizer's own special tokens (not its first token twice), a conversation the chat template and the
    beginning of an answer; ids stay as they are.

    Raises:
        ArgumentError: no chat template, or a prompt that leaves no room for ``max_new_tokens``.
    """
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    encoded = []
    kinds = [prompt_kind(prompt) for prompt in prompts]
    if "chat" in kinds and not tokenizer.chat_template:
        index = kinds.index("chat")
        raise ArgumentError(
            f"prompts[{index}]", prompts[index], "the tokenizer has no chat template: give text, or set a template"
        )
    chats = [list(prompt) for prompt, kind in zip(prompts, kinds, strict=True) if kind == "chat"]
    # In one call: a template is looked up and a tokenizer set up each time.
    answered: Iterator[list[int]] = iter(
        tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_dict=False, tokenizer_kwargs={"verbose": False}
        )
        if chats
        else ()
    )
    for index, (prompt, kind) in enumerate(zip(prompts, kinds, strict=True)):
        if kind == "chat":
            ids = next(answered)
        elif kind == "ids":
            ids = list(prompt)  # type: ignore[arg-type]
        else:
            begun = bool(tokenizer.bos_token) and str(prompt).startswith(tokenizer.bos_token)
            ids = tokenizer(prompt, add_special_tokens=not begun, verbose=False).input_ids
            if ids and ids[-1] == tokenizer.eos_token_id and not str(prompt).endswith(tokenizer.eos_token):
                ids = ids[:-1]  # some tokenizers end every text, and an ended text cannot be continued
        if not ids:
            raise ArgumentError(f"prompts[{index}]", prompt, "it has no tokens: give a prompt that is not empty")
        if len(ids) + decoding.max_new_tokens > room:
            raise ArgumentError(
                "max_new_tokens",
                decoding.max_new_tokens,
                f"prompt {index} has {len(ids)} tokens and the model room for {room}: lower it or drop the prompt",
            )
        encoded.append(ids)
    return encoded


def end_tokens(model: Any, tokenizer: Any, decoding: Decoding) -> list[int]:
    """Token ids that end an answer: the model's, the tokenizer's, and stop texts that are special tokens."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    found = set(configured) if isinstance(configured, list) else {configured}
    found.add(tokenizer.eos_token_id)
    special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    found |= {special.get(text) for text in decoding.stop}
    return sorted(token for token in found if token is not None)


def answers(
    model: Any, tokenizer: Any, wanted: Sequence[Request], encoded: Sequence[list[int]], decoding: Decoding
) -> Iterator[list[tuple[Request, Generation]]]:
    """Batches of answers, longest prompts first, so that the first batch shows whether memory suffices.

    A batch that does not fit the accelerator is halved, and so are those after it; the draws do not notice.
    """
    ends = end_tokens(model, tokenizer, decoding)
    ordered = sorted(wanted, key=lambda request: -len(encoded[request.index]))
    was_training = model.training
    model.eval()
    start, size = 0, decoding.batch_size
    try:
        while start < len(ordered):
            batch = ordered[start : start + size]
            ids = [encoded[request.index] for request in batch]
            rows = None
            try:
                rows = _write(model, tokenizer, ids, [r.draw for r in batch], ends, decoding)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
            if rows is None:  # only here the error has let go of the batch's tensors
                torch.cuda.empty_cache()
                size = len(batch) // 2
                continue
            start += len(batch)
            yield [
                (request, _generation(request, row, tokenizer, ends, decoding.stop))
                for request, row in zip(batch, rows, strict=True)
            ]
    finally:
        model.train(was_training)


def _generation(request: Request, row: list[int], tokenizer: Any, ends: list[int], stops: Sequence[str]) -> Generation:
    """Cut a padded row at its end; a row that ended is followed by padding that may look like anything."""
    finished = False
    for place, token in enumerate(row):
        if token in ends:
            row, finished = row[:place], True
            break
    text = tokenizer.decode(row, skip_special_tokens=True)
    cuts = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    if cuts:
        # Whatever follows a stop text (the end of its token, padding) goes, from the count as well.
        text, finished = text[: min(cuts)], True
        row = tokenizer(text, add_special_tokens=False).input_ids
    return Generation(request.index, request.sample, request.prompt, text, finished, len(row))
