"""Reference log-probabilities: computed once, kept in files, so that no reference model is held while training.

A file is named by what its numbers depend on: the reference's weights and configuration, the tokens, the precision.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from paretune.atomic import write_bytes
from paretune.errors import ArgumentError, CheckpointError
from paretune.training.digest import checkpoint_fingerprint, config_text, model_fingerprint
from paretune.training.logps import summed_logps
from paretune.training.ranks import rank, sum_over_ranks, world_size

if TYPE_CHECKING:
    from paretune.training.objectives import Setup
    from paretune.training.sequences import Sequences

ReferenceModel = str | Path | Sequence[str] | nn.Module | None

_logger = logging.getLogger("paretune.training")


def reference_logps(
    parts: Sequence[Sequences], setup: Setup, reference: ReferenceModel, cache_dir: str | Path | None = None
) -> list[Tensor]:
    """The log-probability of every sequence's completion under the reference.

    Args:
        parts: token sequences.
        setup: of the run; its model is the reference where no other is named.
        reference: None for the policy where it starts (with a fresh LoRA adapter: the model under it); a path or
            hub id; several of them for the mean of their weights; or a model.
        cache_dir: where files are kept; :func:`cache_directory` by default.

    Returns:
        For each part [sequences] float32, in nats.

    Raises:
        CheckpointError: a reference cannot be read.

    Reference: arXiv 2411.01798 (SALSA) for the mean of several models as a reference.
    """
    with _opened(reference, setup) as (fingerprint, model):
        key = hashlib.sha256(fingerprint.encode())
        for part in parts:
            key.update(part.digest().encode())
        arguments = setup.args
        key.update(f"{setup.model.dtype} {arguments.bf16} {arguments.fp16}".encode())
        file = Path(cache_dir or cache_directory()) / f"{key.hexdigest()[:32]}.safetensors"
        sizes = [len(part) for part in parts]
        known = _read(file, sizes) if rank() == 0 else None
        if bool(sum_over_ranks(torch.tensor(float(known is not None)))):
            # Only the first rank may see the file: it sends what it read.
            return [sum_over_ranks(_or_zeros(known, index, size)) for index, size in enumerate(sizes)]
        _logger.info(f"{setup.name}: reference log-probabilities of {sum(sizes)} sequences, kept in {file}")
        values = [_score(model(), part, setup) for part in parts]
    if rank() == 0:
        _write(file, values)
    return values


def cache_directory() -> Path:
    """Where files are kept: ``$PARETUNE_CACHE/references``, by default ``~/.cache/paretune/references``."""
    return Path(os.environ.get("PARETUNE_CACHE", "~/.cache/paretune")).expanduser() / "references"


# -- which model ---------------------------------------------------------------------------------------------


@contextmanager
def _opened(reference: ReferenceModel, setup: Setup) -> Iterator[tuple[str, Any]]:
    """A reference's fingerprint, and a function that gives the model; what was loaded is freed at the end."""
    loaded: list[nn.Module] = []

    def load(paths: Sequence[str]) -> nn.Module:
        loaded.append(_mean_of(paths, setup))
        return loaded[0]

    if reference is None or isinstance(reference, nn.Module):
        model: Any = setup.model if reference is None else reference
        with _without_fresh_adapter(model) as fresh:
            yield model_fingerprint(model, leave_out="lora_" if fresh else None), lambda: model
        return
    paths = [str(reference)] if isinstance(reference, (str, Path)) else [str(path) for path in reference]
    if not paths:
        raise ArgumentError("ref_model", reference, "name at least one model")
    try:
        yield " ".join(sorted(_path_fingerprint(path) for path in paths)), lambda: load(paths)
    finally:
        loaded.clear()
        gc.collect()


@contextmanager
def _without_fresh_adapter(model: Any) -> Iterator[bool]:
    """Switch off a LoRA adapter that changes nothing yet, so that its random half is no part of the fingerprint."""
    updates = [tensor for name, tensor in model.named_parameters() if "lora_B" in name or "lora_embedding_B" in name]
    others = [name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
    fresh = bool(updates) and not others and all(not tensor.any() for tensor in updates)
    with model.disable_adapter() if fresh else contextlib.nullcontext():
        yield fresh


def _path_fingerprint(path: str) -> str:
    from transformers import AutoConfig

    from paretune.checkpoint import Checkpoint

    try:
        found = Checkpoint(path)
        config = AutoConfig.from_pretrained(path)
    except (CheckpointError, OSError, ValueError) as error:
        text = " ".join(str(error).split())
        raise CheckpointError(f"ref_model={path!r}: {text.removeprefix(f'{path}: ')}") from error
    return checkpoint_fingerprint(found) + hashlib.sha256(config_text(config).encode()).hexdigest()[:32]


def _mean_of(paths: Sequence[str], setup: Setup) -> nn.Module:
    """One model, or the mean of the weights of several."""
    from transformers import AutoModelForCausalLM

    def load(path: str, dtype: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)

    dtype = setup.model.dtype
    if len(paths) == 1:
        return load(paths[0], dtype).to(setup.args.device)
    mean = load(paths[0], torch.float32)
    with torch.no_grad():
        for path in paths[1:]:
            other = dict(load(path, torch.float32).named_parameters())
            for name, p in mean.named_parameters():
                if name not in other or other[name].shape != p.shape:
                    raise CheckpointError(f"ref_model={path!r}: {name} is absent or of another shape in it")
                p.add_(other[name])
        for p in mean.parameters():
            p.div_(len(paths))
    return mean.to(device=setup.args.device, dtype=dtype)


# -- numbers -------------------------------------------------------------------------------------------------


@torch.no_grad()
def _score(model: nn.Module, part: Sequences, setup: Setup) -> Tensor:
    """Each rank scores its share, in batches of similar length."""
    from tqdm import tqdm

    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    size = setup.args.per_device_eval_batch_size
    order = part.lengths.argsort(kind="stable")
    chunks = [order[start : start + size] for start in range(0, len(order), size)][rank() :: world_size()]
    values = torch.zeros(len(part))
    pad = setup.tokenizer.pad_token_id
    with setup.autocast():
        for rows in tqdm(chunks, desc="reference", disable=setup.args.disable_tqdm or rank() != 0, leave=False):
            ids, completion = part.pad(rows.tolist(), pad)
            values[torch.from_numpy(rows)] = summed_logps(model, ids.to(device), completion.to(device)).float().cpu()
    model.train(was_training)
    return sum_over_ranks(values)


def _or_zeros(known: list[Tensor] | None, index: int, size: int) -> Tensor:
    return torch.zeros(size) if known is None else known[index]


def _read(file: Path, sizes: Sequence[int]) -> list[Tensor] | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(file)
    except (OSError, SafetensorError):
        return None  # not there, or cut short: computed again and replaced
    values = [found.get(f"ref_logps.{index}") for index in range(len(sizes))]
    whole = all(value is not None and len(value) == size for value, size in zip(values, sizes, strict=True))
    return [value for value in values if value is not None] if whole else None


def _write(file: Path, values: Sequence[Tensor]) -> None:
    from safetensors.torch import save

    write_bytes(file, save({f"ref_logps.{index}": value.contiguous() for index, value in enumerate(values)}))
