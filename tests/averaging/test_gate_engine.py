"""The gate through the merge engine: adapters, bfloat16, tied heads that are stored, streamed as well as in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from averaging_models import save_ends, token_rows
from safetensors.torch import load_file, save_file
from torch import Tensor

from paretune.averaging.fisher_gate import Gate, fisher_gate
from paretune.cli.main import main

KINDS = ["llama", "llama-tied"]


def opened(path: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path)


def weights(folder: str | Path) -> dict[str, Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def save_gate(pre: str, file: Path, weight: float, mode: str) -> Gate:
    gate = fisher_gate(
        None, opened(pre).float(), token_rows(3), token_rows(4, seed=9), weight, mode=mode, override=True
    )  # type: ignore[arg-type]
    gate.save(file)
    return gate


def applied(pre: str, post: str, gate: Path, out: Path, scale: float = 1.0) -> dict[str, Tensor]:
    command = ["average", "fisher", "--pre", pre, "--post", post, "--gate", str(gate), "--scale", str(scale), "-o",
               str(out), "--override", "--quiet", "--workers", "2"]  # fmt: skip
    assert main(command) == 0
    return weights(out)


def adapter(pre: str, folder: Path) -> tuple[str, dict[str, Tensor]]:
    """MODEL+ADAPTER, and the weights that PEFT gives it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(r=2, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(opened(pre), config)
    model.save_pretrained(folder / "adapter")
    return f"{pre}+{folder / 'adapter'}", dict(model.merge_and_unload().named_parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["entries", "tensors"])
def test_an_adapter_is_gated(kind: str, mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """λ = 0 returns what merging the adapter alone gives, to the bit; λ = ∞ the reference; between, the naive gate."""
    pre, _ = save_ends(tmp_path, kind)
    post, policy = adapter(pre, tmp_path)
    assert main(["merge", "linear", "--model", f"{post}=1", "-o", str(tmp_path / "whole"), "--quiet"]) == 0
    for weight, end in ((0.0, tmp_path / "whole"), (float("inf"), pre)):
        save_gate(pre, tmp_path / f"{weight}.safetensors", weight, mode)
        got = applied(pre, post, tmp_path / f"{weight}.safetensors", tmp_path / f"out {weight}")
        want = weights(end)
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
    gate = save_gate(pre, tmp_path / "gate.safetensors", 2.0, mode)
    got, reference = applied(pre, post, tmp_path / "gate.safetensors", tmp_path / "out", 1.7), weights(pre)
    for name, tensor in policy.items():
        naive = reference[name].double() + 1.7 * gate.factors[name].double() * (tensor.double() - reference[name])
        assert torch.allclose(got[name].double(), naive, atol=1e-6), name


@pytest.mark.parametrize("mode", ["entries", "tensors"])
def test_bfloat16_is_rounded_once(mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pre, post = save_ends(tmp_path, "llama", dtype=torch.bfloat16)
    gate = save_gate(pre, tmp_path / "gate.safetensors", 2.0, mode)
    got = applied(pre, post, tmp_path / "gate.safetensors", tmp_path / "out", 0.8)
    ends = weights(pre), weights(post)
    for name, tensor in got.items():
        low, high = (end[name].double() for end in ends)
        naive = low + 0.8 * gate.factors[name].double() * (high - low)
        assert tensor.dtype == torch.bfloat16
        # Halfway cases apart, the nearest bfloat16 of the exact value.
        assert ((tensor.double() - naive).abs() <= (naive.bfloat16().double() - naive).abs() * 1.0001 + 1e-9).all()
    by_hand = gate.merged(*ends, scale=0.8)
    assert all(torch.equal(got[name], by_hand[name]) for name in got)


@pytest.mark.parametrize("mode", ["entries", "tensors"])
def test_a_stored_tied_head_has_the_embeddings_factor(
    mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some checkpoints store the head although it is tied; the gate, like the model, knows one parameter."""
    pre, post = save_ends(tmp_path, "llama-tied")
    gate = save_gate(pre, tmp_path / "gate.safetensors", 2.0, mode)
    want = gate.merged(weights(pre), weights(post))
    for end in (pre, post):
        tensors = weights(end)
        head = tensors["model.embed_tokens.weight"]
        save_file({**tensors, "lm_head.weight": head.clone()}, Path(end) / "model.safetensors", {"format": "pt"})
    got = applied(pre, post, tmp_path / "gate.safetensors", tmp_path / "out")
    assert torch.equal(got.get("lm_head.weight", got["model.embed_tokens.weight"]), want["model.embed_tokens.weight"])
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


@pytest.mark.parametrize("mode", ["entries", "tensors"])
@pytest.mark.parametrize("lacking", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_gate_without_a_tensor_is_refused(
    mode: str, lacking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing but a tied head may take another tensor's factor, also where a factor has no shape that could tell."""
    pre, post = save_ends(tmp_path, "llama")
    gate = save_gate(pre, tmp_path / "gate.safetensors", 2.0, mode)
    factors = {name: factor for name, factor in gate.factors.items() if name != lacking}
    if lacking == "lm_head.weight":  # another vocabulary's embedding
        factors["model.embed_tokens.weight"] = torch.ones((7, 16) if mode == "entries" else ())
    about = {**gate.about, "numel": {**gate.about["numel"], "model.embed_tokens.weight": 7 * 16}}
    Gate(factors, 2.0, 9.0, about).save(tmp_path / "less.safetensors")
    command = ["average", "fisher", "--pre", pre, "--post", post, "--gate", str(tmp_path / "less.safetensors"), "-o",
               str(tmp_path / "out")]  # fmt: skip
    assert main(command) == 2
    assert "no factor of its shape" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_is_the_same_gate(kind: str, tmp_path: Path) -> None:
    """Sums of squares in files or in memory, micro-batches of one: the same bits."""
    pre, _ = save_ends(tmp_path, kind)
    rows = token_rows(3), token_rows(4, seed=9)
    in_memory = fisher_gate(None, opened(pre), *rows, 1.5, override=True)
    on_disk = fisher_gate(None, opened(pre), *rows, 1.5, override=True, scratch=tmp_path)
    assert in_memory.factors.keys() == on_disk.factors.keys()
    assert all(torch.equal(on_disk.factors[name], factor) for name, factor in in_memory.factors.items())
    by_tensor = fisher_gate(None, opened(pre), *rows, 1.5, override=True, mode="tensors")
    assert by_tensor.ratio == pytest.approx(in_memory.ratio, rel=1e-5)


def test_gradients_are_freed_as_they_come(tmp_path: Path) -> None:
    """In the per-tensor mode no more than a few gradients exist at a time, whatever the model's depth."""
    pre, _ = save_ends(tmp_path, "llama")
    model = opened(pre)
    most = [0]
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(
            lambda _: most.__setitem__(0, max(most[0], sum(q.grad is not None for q in model.parameters())))
        )
    fisher_gate(None, model, token_rows(2), token_rows(2, seed=9), mode="tensors", override=True)
    assert most[0] <= 2
