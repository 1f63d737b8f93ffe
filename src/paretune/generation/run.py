"""``generate``: answers to prompts, from a model or a server, kept in a file that survives a kill."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError, DataError
from .decoding import Decoding, Generation, Prompt, Request, check_prompts, instruction, prompt_kind, requests
from .endpoint import Client, Endpoint
from .prompts import read_rows
from .store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate(
    source: PreTrainedModel | Endpoint | str,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    tokenizer: PreTrainedTokenizerBase | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    name: str | None = None,
    progress: bool = True,
) -> list[Generation]:
    """Answer prompts.

    A model in this process answers in batches with left padding. Sampled answers depend on the seed, the prompt and the
    sample's number, never on the batch, on what else is asked or on an interruption; greedy answers of different batch
    sizes differ only where two tokens are equally likely to within rounding. Settings in the model's own generation
    file other than its end tokens (temperature, repetition penalty …) are not used: what is not in ``decoding`` is off.

    Args:
        source: a causal language model with its tokenizer, the path of one, or an `Endpoint`.
        prompts: each is text (continued as it stands), a list of messages (answered through the chat template) or a
            list of token ids.
        decoding: how.
        tokenizer: of a model given as an object.
        out: a file of JSON lines. Answers are added batch by batch and synced to the disk; asked again, only what is
            missing is written, and at the end the rows are in the order of the prompts. Rows name the model by a hash
            of its weights.
        name: the ``generator`` in the rows; by default the model's path.
        progress: show a bar on stderr where that is a terminal.

    Returns:
        Prompt by prompt, sample by sample.

    Raises:
        ArgumentError: an argument cannot work, or ``out`` holds answers of another model, with other settings or to
            other prompts.
        EndpointError: the server fails for good; what was written until then is kept in ``out``.

    Example:
        >>> import torch, transformers
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> words = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "b": 2}, unk_token="<eos>"))
        >>> words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        >>> tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=3, eos_token_id=0, **sizes))
        >>> sampled = generate(model, ["a b", "b"], Decoding(4, temperature=1.0, samples=2), tokenizer)
        >>> [(g.index, g.sample) for g in sampled]
        [(0, 0), (0, 1), (1, 0), (1, 1)]
    """
    check_prompts(prompts)
    if isinstance(source, Endpoint):
        contents: list[Any] = list(prompts)
        identity = hashlib.sha256(json.dumps(source.record(), sort_keys=True).encode()).hexdigest()[:32]
        name = name or source.model
        kinds = [prompt_kind(prompt) for prompt in prompts]
        wanted = requests(prompts, contents, decoding, identity)
        with Client(source) as client, Store(out) as store:
            missing = _missing(store, wanted, identity, decoding)
            batches: Iterator[list[tuple[Request, Generation]]] = (
                [(task, answer)]
                for task, answer in client.each(missing, lambda r: _served(client, r, kinds[r.index], decoding))
            )
            return _collect(batches, store, wanted, len(missing), identity, decoding, name, progress)

    from . import local
    from .fingerprint import model_fingerprint

    if isinstance(source, str | os.PathLike):
        name = name or str(source)
        model, tokenizer = local.load(str(source))
    else:
        model = source
    if tokenizer is None:
        raise ArgumentError("tokenizer", None, "give the model's tokenizer")
    if model.config.is_encoder_decoder or not model.can_generate():
        raise ArgumentError("source", type(model).__name__, "give a causal language model")
    encoded = local.encode(prompts, tokenizer, model, decoding)
    ends = local.end_tokens(model, tokenizer, decoding)
    identity = model_fingerprint(model)
    wanted = requests(prompts, encoded, decoding, f"{identity} {ends}")
    name = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
    with Store(out) as store:
        missing = _missing(store, wanted, identity, decoding)
        batches = local.answers(model, tokenizer, missing, encoded, decoding)
        return _collect(batches, store, wanted, len(missing), identity, decoding, name, progress)


def read_generations(path: str | os.PathLike[str], argument: str = "generations") -> list[Generation]:
    """The answers in a file that `generate` wrote, or any JSON lines or JSON list with AlpacaEval's field names.

    Args:
        path: rows with ``instruction`` and ``output``.
        argument: what the user calls it, for messages.

    Raises:
        DataError: it cannot be read or lacks the fields.
    """
    found = []
    for number, row in enumerate(read_rows(path, argument)):
        if not isinstance(row.get("instruction"), str) or not isinstance(row.get("output"), str):
            raise DataError(
                f"{argument}={str(path)!r}: row {number + 1} lacks instruction or output: use AlpacaEval's field names"
            )
        prompt: Prompt = row.get("prompt") or row["instruction"]
        index, sample = row.get("index", number), row.get("sample", 0)
        found.append(Generation(index, sample, prompt, row["output"], row.get("finished", True), row.get("tokens")))
    return found


def _missing(store: Store, wanted: Sequence[Request], identity: str, decoding: Decoding) -> list[Request]:
    """What the file does not hold yet; refuses a file that belongs to something else."""
    asked, settings = {request.key for request in wanted}, decoding.record()
    for key, row in store.rows.items():
        if key in asked:
            continue
        if row.get("model") != identity:
            what = f"answers of another model ({row.get('generator')!r})"
        elif row.get("decoding") != settings:
            what = "answers written with other decoding settings"
        else:
            what = "answers to prompts or samples that are not asked for now"
        raise ArgumentError("out", str(store.path), f"holds {what}: name another file")
    return [request for request in wanted if request.key not in store.rows]


def _collect(
    batches: Iterator[list[tuple[Request, Generation]]],
    store: Store,
    wanted: Sequence[Request],
    missing: int,
    identity: str,
    decoding: Decoding,
    name: str,
    progress: bool,
) -> list[Generation]:
    from tqdm import tqdm

    done, settings = len(wanted) - missing, decoding.record()
    with tqdm(total=len(wanted), initial=done, unit="answer", disable=None if progress else True) as bar:
        for batch in batches:
            store.append(
                {
                    "key": request.key,
                    "instruction": instruction(request.prompt),
                    "output": answer.text,
                    "generator": name,
                    "prompt": request.prompt,
                    "index": request.index,
                    "sample": request.sample,
                    "finished": answer.finished,
                    "tokens": answer.tokens,
                    "decoding": settings,
                    "model": identity,
                }
                for request, answer in batch
            )
            bar.update(len(batch))
    for request in wanted:
        store.rows[request.key]["index"] = request.index  # prompts may have moved since a row was written
    store.rewrite([request.key for request in wanted])
    rows = [store.rows[request.key] for request in wanted]
    return [
        Generation(r.index, r.sample, r.prompt, row["output"], row["finished"], row["tokens"])
        for r, row in zip(wanted, rows, strict=True)
    ]


def _served(client: Client, request: Request, kind: str | None, decoding: Decoding) -> Generation:
    """One answer by a server."""
    body: dict[str, Any] = {
        "max_tokens": decoding.max_new_tokens,
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        "seed": request.draw & 0x7FFFFFFF,
    }
    if decoding.stop:
        body["stop"] = list(decoding.stop)
    if decoding.top_k:
        body["top_k"] = decoding.top_k  # not OpenAI's own, but vLLM's and others'
    chat = kind == "chat"
    body["messages" if chat else "prompt"] = list(request.prompt) if kind != "text" else request.prompt

    def read(answer: dict[str, Any]) -> Generation:
        choice = answer["choices"][0]
        text = choice["message"]["content"] if chat else choice["text"]
        if text is None and chat:
            text = choice["message"]["refusal"]  # what the model says instead
        if not isinstance(text, str):
            raise TypeError("no text")
        tokens = (answer.get("usage") or {}).get("completion_tokens")
        finished = choice.get("finish_reason") == "stop"
        return Generation(request.index, request.sample, request.prompt, text, finished, tokens)

    return client.ask("chat/completions" if chat else "completions", body, read)
