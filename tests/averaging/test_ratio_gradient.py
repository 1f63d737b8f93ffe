"""The ratios' gradient, and the dialled model, against autograd through interpolated weights and finite differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from averaging_models import save_ends, token_rows
from torch import Tensor

from paretune.averaging.blocks import lay_out
from paretune.averaging.dialled import DialledModel
from paretune.averaging.ends import Ends
from paretune.averaging.samples import collate, encode, nll

KINDS = ("llama", "llama-tied", "qwen2", "gpt2", "mixtral", "qwen2-moe")


def load(path: str) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    if model.config.model_type in ("mixtral", "qwen2_moe"):
        model.set_experts_implementation("eager")  # the default one refuses float64
    return model


def blocks_by_parameter(model: Any, kind: str) -> dict[str, int | str]:
    """Each parameter's block out of three, or its part, written down for four layers without the package's rules."""
    found: dict[str, int | str] = {}
    for name, _ in model.named_parameters():
        if "norm" in name or ".ln_" in name:
            found[name] = "norms"
        elif ".layers." in name or ".h." in name:
            layer = int(name.split(".layers." if ".layers." in name else ".h.")[1].split(".")[0])
            found[name] = {0: 0, 1: 1, 2: 2, 3: 2}[layer]
        else:
            found[name] = "head" if name.startswith("lm_head") else "embeddings"
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_equals_autograd_and_finite_differences(kind: str, tmp_path: Path) -> None:
    pre_path, post_path = save_ends(tmp_path, kind)
    pre, post, model = load(pre_path), load(post_path), load(post_path)
    batch = collate(encode(token_rows(), None))
    own = {"head": 0.1, "embeddings": 0.5, "norms": 0.7}
    point = [0.3, 0.15, 0.45]

    place = blocks_by_parameter(post, kind)
    ends_of = dict(pre.named_parameters()), dict(post.named_parameters())

    def theta(alpha: Tensor) -> dict[str, Tensor]:
        made = {}
        for name, where in place.items():
            ratio = own[where] if isinstance(where, str) else alpha[where]
            made[name] = ratio * ends_of[0][name].detach() + (1 - ratio) * ends_of[1][name].detach()
        return made

    class Summed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = post

        def forward(self) -> Tensor:
            return nll(self.inner, batch)

    def oracle(alpha: Tensor) -> Tensor:
        named = {f"inner.{name}": value for name, value in theta(alpha).items()}
        return torch.func.functional_call(Summed(), named, ())

    ends = Ends(pre_path, post_path)
    with DialledModel(model, ends, lay_out(ends.shapes, 3, tied=ends.tied), own) as dialled:
        dialled.dial(point)
        for name, value in theta(torch.tensor(point)).items():
            torch.testing.assert_close(dict(model.named_parameters())[name].detach(), value, rtol=1e-5, atol=1e-6)
        loss = nll(model, batch)
        loss.backward()
        got = dialled.gradient.clone()
        assert all(parameter.grad is None for parameter in model.parameters())
    alpha = torch.tensor(point, requires_grad=True)
    expected = oracle(alpha)
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-5, atol=1e-5)
    (wanted,) = torch.autograd.grad(expected, alpha)
    torch.testing.assert_close(got, wanted.double(), rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    assert all(parameter.requires_grad for parameter in model.parameters())  # as it was

    if kind == "qwen2-moe":  # its router picks two experts of three: the loss jumps where it picks others
        return
    for end in (pre, post):
        end.double()
    step, start = 0.02, torch.tensor(point, dtype=torch.float64)  # norms and routers compute in float32: no small steps
    with torch.no_grad():
        for k in range(3):
            away = torch.zeros(3, dtype=torch.float64)
            away[k] = step
            near, far = (oracle(start + i * away) - oracle(start - i * away) for i in (1, 2))
            slope = (8 * near - far) / (12 * step)
            torch.testing.assert_close(got[k], slope, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ends_to_the_bit(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    paths = save_ends(tmp_path, kind, dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(paths[1], dtype=dtype)
    ends = Ends(*paths)
    for alpha, path in ((1.0, paths[0]), (0.0, paths[1])):
        own = dict.fromkeys(("head", "embeddings", "norms"), alpha)
        with DialledModel(model, ends, lay_out(ends.shapes, 2, tied=ends.tied), own) as dialled:
            dialled.dial([alpha, alpha])
        wanted = dict(AutoModelForCausalLM.from_pretrained(path, dtype=dtype).named_parameters())
        assert all(torch.equal(parameter, wanted[name]) for name, parameter in model.named_parameters())


def test_one_gradient_at_a_time(tmp_path: Path) -> None:
    """When a weight's gradient has been used it is gone: no more than one is ever there."""
    paths = save_ends(tmp_path, "llama")
    model = load(paths[1])
    held: list[int] = []
    ends = Ends(*paths)
    with DialledModel(model, ends, lay_out(ends.shapes, 2), dict.fromkeys(("head", "embeddings", "norms"), 0.0)):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(
                    lambda p: held.append(sum(q.grad is not None for q in model.parameters()))
                )
        nll(model, collate(encode(token_rows(), None))).backward()
    assert len(held) == 4 * 7
    assert set(held) == {0}


def test_gradients_of_micro_batches_add_up(tmp_path: Path) -> None:
    paths = save_ends(tmp_path, "llama")
    model, ends = load(paths[1]), Ends(*paths)
    samples = encode(token_rows(), None)
    with DialledModel(model, ends, lay_out(ends.shapes, 3), dict.fromkeys(("head", "embeddings", "norms"), 0.2)) as d:
        d.dial([0.2, 0.2, 0.2])
        nll(model, collate(samples)).backward()
        whole = d.gradient.clone()
        d.zero()
        for start in range(0, 6, 2):
            nll(model, collate(samples[start : start + 2])).backward()
        torch.testing.assert_close(d.gradient, whole, rtol=1e-4, atol=1e-5)
