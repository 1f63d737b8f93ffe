"""A loaded model dialled between two checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from merge_models import read

import paretune as pt
from paretune.errors import ArgumentError, CheckpointError, MismatchError


def llama(root: Path, name: str, seed: int, dtype: torch.dtype, tied: bool = False) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(root / name)
    return str(root / name)


def load(path: str | Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype="auto")


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)) for name in a)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_dial(dtype: torch.dtype, tied: bool, tmp_path: Path) -> None:
    """The end points come back to the bit, in any order; between them it is the offline merge to the bit."""
    pre, post = (llama(tmp_path, name, seed, dtype, tied) for seed, name in enumerate(("pre", "post")))
    model = load(post)
    before = state(model)
    storage = [parameter.data_ptr() for parameter in model.parameters()]
    live = pt.LiveMerge(model, pre=pre, post=post)
    pt.merge("linear", {pre: 0.3, post: 0.7}, out=tmp_path / "merged")
    offline = state(load(tmp_path / "merged"))
    for _ in range(2):
        assert equal(state(live.set(0.3) and model), offline)
        assert equal(state(live.set(1) and model), state(load(pre)))
        assert equal(state(live.set(0.0) and model), before)
    assert storage == [parameter.data_ptr() for parameter in model.parameters()]


def test_one_ratio_a_block_is_the_partwise_merge(tmp_path: Path) -> None:
    pre, post = (llama(tmp_path, name, seed, torch.bfloat16) for seed, name in enumerate(("pre", "post")))
    model = load(post)
    pt.LiveMerge(model, pre=pre, post=post).set([0.1, 0.6], head=1.0)
    pt.merge("linear", [pre, post], out=tmp_path / "out", pivots=[1], ratios=[0.1, 0.6], head=1.0)
    found = read(tmp_path / "out")
    assert equal(state(model), {name: found[name] for name in state(model)})
    pt.LiveMerge(model, pre=pre, post=post, pivots=[0]).set([0.1, 0.6])
    with pytest.raises(ArgumentError, match="blocks"):
        pt.LiveMerge(model, pre=pre, post=post, pivots=[0]).set([0.1, 0.6, 0.2])


def test_merged_models_load_and_compute(tmp_path: Path) -> None:
    """The logits of a merge on disk are those of the same merge in memory."""
    pre, post = (llama(tmp_path, name, seed, torch.float32) for seed, name in enumerate(("pre", "post")))
    pt.merge("linear", {pre: 0.3, post: 0.7}, out=tmp_path / "out", shard_bytes=20_000)
    merged, a, b = load(tmp_path / "out"), state(load(pre)), state(load(post))
    memory = load(pre)
    with torch.no_grad():
        for name, parameter in memory.named_parameters():
            parameter.copy_((0.3 * a[name].double() + 0.7 * b[name].double()).float())
    tokens = torch.arange(20).view(2, 10)
    torch.testing.assert_close(merged(tokens).logits, memory(tokens).logits, rtol=1e-5, atol=1e-5)


def test_refusals(tmp_path: Path) -> None:
    pre = llama(tmp_path, "pre", 0, torch.float32)
    model = load(pre)
    with pytest.raises(CheckpointError):
        pt.LiveMerge(model, pre=pre, post=tmp_path / "absent")
    with pytest.raises(MismatchError, match="lacks"):
        pt.LiveMerge(torch.nn.Linear(2, 2), pre=pre, post=pre)
    with pytest.raises(ArgumentError, match="ratio"):
        pt.LiveMerge(model, pre=pre, post=pre).set(float("nan"))
    with pytest.raises(ArgumentError, match="layers"):
        pt.LiveMerge(model, pre=pre, post=pre).set([0.1] * 5)
    with pytest.raises(ArgumentError, match="pre"):
        pt.LiveMerge(model, pre=model, post=pre)  # type: ignore[arg-type]
