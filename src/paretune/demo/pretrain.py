"""The demo's base and reference models: a tiny Llama trained from nothing, then tuned on dialogues; cached on disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from paretune.demo import words
from paretune.demo.world import World, chat_document, options_of, raw_document

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import LlamaForCausalLM

Progress = Callable[[int, int], None]  # (steps done, steps in all)
ROW_TOKENS = 48


@dataclass(frozen=True)
class Shape:
    """The architecture, in `LlamaConfig`'s terms; about 350k parameters."""

    hidden: int = 96
    layers: int = 3
    heads: int = 4
    intermediate: int = 256
    tied: bool = True
    initializer_range: float = 0.05  # 0.02, made for wide models, learns three times slower at this width
    rope_theta: float = 500.0  # rows are 48 tokens long


@dataclass(frozen=True)
class Phase:
    """One training phase: a cosine schedule from a peak learning rate to a tenth of it.

    Args:
        steps: optimizer steps.
        rows: packed rows of 48 tokens in a batch.
        lr: peak learning rate.
        warmup: steps of linear warm-up.
        weight_decay: AdamW's.
        bf16: forward and backward under bfloat16 autocast; the parameters and AdamW stay float32. Twice as fast on a
            processor with bfloat16 matrix units from about 5M parameters on.

    Small batches win here: 1800 steps of 12 rows teach far more than 300 of 64 at the same cost.
    """

    steps: int
    rows: int
    lr: float
    warmup: int = 20
    weight_decay: float = 0.1
    bf16: bool = False


@dataclass(frozen=True)
class Recipe:
    """Everything that the base and the reference follow from.

    Example:
        >>> Recipe(World(seed=1)).base_key == Recipe(World(seed=2)).base_key
        False
    """

    world: World = field(default_factory=World)
    shape: Shape = field(default_factory=Shape)
    base: Phase = field(default_factory=lambda: Phase(steps=1800, rows=12, lr=2e-3))
    sft: Phase = field(default_factory=lambda: Phase(steps=400, rows=20, lr=1e-3))

    @cached_property
    def base_key(self) -> str:
        """Hash of all that decides the base: what it reads, how it is trained, which libraries do it."""
        import torch
        import transformers

        versions = [torch.__version__.split("+")[0], transformers.__version__.split(".")[0]]
        text = _opening(base_documents(self.world))
        return _hash(text, words.vocabulary(), asdict(self.shape), options_of(self.base), self.world.seed, versions)

    @cached_property
    def reference_key(self) -> str:
        """Hash of all that decides the reference. Worlds that differ only in what comes later share their models."""
        return _hash(self.base_key, _opening(sft_documents(self.world)), options_of(self.sft))


def _opening(documents: Iterator[str]) -> list[str]:
    return list(islice(documents, 1000))


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def default_cache() -> Path:
    """Where models are kept between runs: ``$PARETUNE_CACHE``, else ``$XDG_CACHE_HOME``/paretune, else ~/.cache."""
    named = os.environ.get("PARETUNE_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paretune" / "demo"


def build_model(shape: Shape, seed: int) -> LlamaForCausalLM:
    """An untrained Llama over the world's vocabulary; the global random state is left as it was."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    vocabulary = words.vocabulary()
    ids = {word: vocabulary.index(word) for word in words.SPECIAL}
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=256,
        initializer_range=shape.initializer_range,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=shape.tied,
        bos_token_id=ids[words.START],
        eos_token_id=ids[words.END],
        pad_token_id=ids[words.PAD],
        attn_implementation="sdpa",  # type: ignore[call-arg]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=ids[words.START], eos_token_id=ids[words.END], pad_token_id=ids[words.PAD], max_new_tokens=48
    )
    return model


def whole_rows(documents: Iterator[str], rows: int) -> Iterator[Tensor]:
    """Endless batches [rows, 48] in which no document is cut: an answer always follows its own prompt."""
    import torch

    index = {word: i for i, word in enumerate(words.vocabulary())}
    pad = index[words.PAD]
    batch: list[list[int]] = [[]]
    for document in documents:
        ids = [index[word] for word in document.split()]
        if len(batch[-1]) + len(ids) > ROW_TOKENS:
            if len(batch) == rows:
                yield torch.tensor([row + [pad] * (ROW_TOKENS - len(row)) for row in batch])
                batch = []
            batch.append([])
        batch[-1].extend(ids)


def base_documents(world: World) -> Iterator[str]:
    """What the base reads."""
    return (raw_document(text) for text in world.raw_texts())


def sft_documents(world: World) -> Iterator[str]:
    """What SFT reads: dialogues, and raw text in its share."""
    rng = world.rng("sft mixture")
    dialogues, raw = world.dialogues(), world.raw_texts("sft raw")
    while True:
        yield raw_document(next(raw)) if rng.random() < world.raw_share else chat_document(next(dialogues))


def learning_rate(phase: Phase, step: int) -> float:
    """Linear warm-up, then a cosine to a tenth of the peak."""
    import math

    if step < phase.warmup:
        return phase.lr * (step + 1) / phase.warmup
    done = (step - phase.warmup) / max(1, phase.steps - phase.warmup)
    return phase.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def train_phase(
    model: LlamaForCausalLM, batches: Iterator[Tensor], phase: Phase, progress: Progress | None = None
) -> float:
    """Trains on every token of every document; returns the mean loss of the last tenth of the steps."""
    import torch
    from torch.nn import functional as F

    pad = words.vocabulary().index(words.PAD)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=phase.lr, betas=(0.9, 0.95), weight_decay=phase.weight_decay, fused=True
    )
    model.train()
    if phase.bf16:
        # The fused attention's bfloat16 backward pass takes half of all time on rows this short.
        model.set_attn_implementation("eager")
    tail: list[Tensor] = []
    for step in range(phase.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(phase, step)
        rows = next(batches)
        # No attention mask: causality alone keeps padding on the right from reaching anything.
        with torch.autocast("cpu", torch.bfloat16, enabled=phase.bf16):
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), ignore_index=pad)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step >= phase.steps - max(1, phase.steps // 10):
            tail.append(loss.detach())
        if progress is not None:
            progress(step + 1, phase.steps)
    model.eval()
    if phase.bf16:
        model.set_attn_implementation("sdpa")
    return float(torch.stack(tail).mean())


def load_model(path: Path) -> LlamaForCausalLM:
    """A cached model in fp32, ready to measure or train."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval()


def save_model(model: torch.nn.Module, path: Path) -> None:
    """Writes an ordinary checkpoint with its tokenizer, whole or not at all: temporary name, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        model.save_pretrained(work)  # type: ignore[operator]
        words.build_tokenizer().save_pretrained(str(work))
        for file in (*work.iterdir(), work):
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        os.chmod(work, 0o755)
        try:
            os.rename(work, path)
        except OSError:
            # Another process finished the same model first; its copy is as good.
            if not (path / "config.json").exists():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def prepare(
    recipe: Recipe, cache: Path | None = None, progress: Callable[[str], Progress] | None = None
) -> tuple[Path, Path]:
    """The paths of the base and the reference, trained now where the cache does not have them.

    Args:
        recipe: what to train.
        cache: the cache's directory; default `default_cache`.
        progress: given "base" or "SFT", returns what is told of each step.

    Returns:
        (base, reference): directories with safetensors, configuration and tokenizer.
    """
    root = default_cache() if cache is None else Path(cache)
    base, reference = root / f"base-{recipe.base_key}", root / f"reference-{recipe.reference_key}"
    world = recipe.world
    if not (base / "config.json").exists():
        model = build_model(recipe.shape, world.seed)
        batches = whole_rows(base_documents(world), recipe.base.rows)
        train_phase(model, batches, recipe.base, progress("base") if progress else None)
        save_model(model, base)
    if not (reference / "config.json").exists():
        model = load_model(base)
        batches = whole_rows(sft_documents(world), recipe.sft.rows)
        train_phase(model, batches, recipe.sft, progress("SFT") if progress else None)
        save_model(model, reference)
    return base, reference
