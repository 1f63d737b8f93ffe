"""LoRA beside a gated task vector: against full-weight merging, PEFT's reference policy, saving, and the export."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from builders import assert_close
from tiny_models import make_model, rows
from torch import Tensor, nn

import paretune as pt
from paretune.cli.main import main
from paretune.errors import ArgumentError, MismatchError, StateError
from paretune.operators import mask_key
from paretune.optim.tau_adapter import GATE_FILE, Gate, factors

IN, OUT = 6, 5
TARGETS = ["q_proj", "v_proj", "down_proj"]


def linear_pair() -> tuple[nn.Module, pt.TaskVector]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(IN, OUT, bias=False))
    base = {name: p.detach() - 0.1 * torch.randn(p.shape) for name, p in net.named_parameters()}
    return net, pt.TaskVector.between(base=base, reference=net)


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(8, IN, generator=generator), torch.randn(8, OUT, generator=generator)) for _ in range(steps)]


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for x, y in batches(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


def adapted(net: nn.Module, **options: Any) -> nn.Module:
    return peft.get_peft_model(net, peft.LoraConfig(r=4, lora_alpha=4, target_modules=["0"], **options))


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


INNER = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0),
}


@pytest.mark.parametrize("inner", INNER)
def test_equals_merging_of_all_weights_on_a_linear_model(inner: str) -> None:
    """With A the identity, training B trains W itself: then the effective weights agree to 1e-6."""
    full, tau = linear_pair()
    optimizer = pt.OnlineMerging(
        INNER[inner](list(full.named_parameters())), tau, pt.Random(1.0), pt.WeightedSum(), weight=0.02
    )
    fit(full, optimizer, 20)

    net, tau = linear_pair()
    start = net[0].weight.detach().clone()
    model = peft.get_peft_model(net, peft.LoraConfig(r=IN, lora_alpha=IN, target_modules=["0"]))
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.eye(IN))
    layer.lora_A["default"].weight.requires_grad_(False)
    lora = pt.LoRAMerging(INNER[inner](trained(model)), model, tau, weight=0.02, rank=None)
    fit(model, lora, 20)
    effective = model(torch.eye(IN)).T
    assert lora.gate == pytest.approx(0.4)
    assert_close(effective, full[0].weight.detach(), 1e-6, what="effective weights")
    assert torch.equal(layer.base_layer.weight, start), "the frozen weights are not touched"


def test_weight_zero_is_the_inner_optimizer() -> None:
    results = []
    for merging in (False, True):
        net, tau = linear_pair()
        torch.manual_seed(3)
        model = adapted(net)
        inner = INNER["AdamW"](trained(model))
        fit(model, pt.LoRAMerging(inner, model, tau, weight=0.0) if merging else inner, 5)
        results.append(model(torch.eye(IN)))
    assert torch.equal(*results)


def test_reference_policy_of_peft_does_not_move() -> None:
    net, tau = linear_pair()
    x = torch.randn(3, IN)
    before = net(x)
    model = adapted(net)
    model.add_adapter("ref", model.peft_config["default"])
    fit(model, pt.LoRAMerging(INNER["SGD"](trained(model)), model, tau, weight=0.5), 5)
    with model.disable_adapter():
        assert torch.equal(model(x), before)
    policy = model(x)
    model.set_adapter("ref")
    assert torch.equal(model(x), before)
    model.set_adapter("default")
    assert torch.equal(model(x), policy), "back again"
    assert not torch.equal(policy, before)


@pytest.mark.parametrize("mode", ["gate", "absorb"])
def test_resume_is_bit_equal(mode: str, tmp_path: Path) -> None:
    def build() -> tuple[nn.Module, Any]:
        net, tau = linear_pair()
        torch.manual_seed(3)
        model = adapted(net)
        options = {"mode": mode, "density": 0.5, "rank": 2}
        return model, pt.LoRAMerging(INNER["AdamW"](trained(model)), model, tau, weight=0.1, **options)

    model, optimizer = build()
    fit(model, optimizer, 3)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    factors_then = {name: p.detach().clone() for name, p in trained(model)}
    policy = model(torch.eye(IN))
    buffer.seek(0)
    again, resumed = build()
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    with torch.no_grad():
        for name, p in trained(again):
            p.copy_(factors_then[name])
    assert resumed.gate == pytest.approx(0.15)
    assert torch.equal(again(torch.eye(IN)), policy)
    fit(model, optimizer, 2)
    fit(again, resumed, 2)
    assert torch.equal(again(torch.eye(IN)), model(torch.eye(IN)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_absorbed_additions_are_those_of_ondare(dtype: torch.dtype) -> None:
    net, tau = linear_pair()
    want = net[0].weight.detach().to(dtype).float().clone()
    model = adapted(net.to(dtype))
    optimizer = pt.LoRAMerging(
        INNER["SGD"](trained(model)), model, tau, weight=0.01, density=0.3, mode="absorb", seed=4
    )
    for step in range(6):
        optimizer.zero_grad()
        model(torch.ones(1, IN, dtype=dtype)).sum().backward()
        optimizer.step()
        key = mask_key(4, step, "tau", "0.weight")
        want = want + 0.01 * pt.Random(0.3)(tau.dense("0.weight"), key).view(want.shape)
    got = model.base_model.model[0].base_layer.weight
    assert torch.allclose(got.float(), want, rtol=2**-8 if dtype == torch.bfloat16 else 0, atol=1e-7)
    assert optimizer.gate == pytest.approx(6 * 0.01 * 0.3)
    with pytest.raises(StateError, match="afresh"):
        optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("mode", ["gate", "absorb"])
def test_an_earlier_adapter_brings_its_gate_back(mode: str, tmp_path: Path) -> None:
    """As ``load_best_model_at_end`` does it."""
    net, tau = linear_pair()
    model = adapted(net)
    optimizer = pt.LoRAMerging(INNER["SGD"](trained(model)), model, tau, weight=0.1, mode=mode)
    fit(model, optimizer, 2)
    policy = model(torch.eye(IN))
    model.save_pretrained(tmp_path)
    fit(model, optimizer, 2)
    if mode == "absorb":
        with pytest.raises(StateError, match="absorbed"):
            model.load_adapter(str(tmp_path), "default")
        return
    model.load_adapter(str(tmp_path), "default")
    assert torch.equal(model(torch.eye(IN)), policy)
    assert optimizer.gate == pytest.approx(0.2)


def test_low_rank_factors_are_nearly_the_best() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(300, 200, generator=generator) @ torch.diag(0.97 ** torch.arange(200.0))
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    before = torch.random.get_rng_state()
    up, down = factors(matrix, 16, "w")
    assert torch.equal(torch.random.get_rng_state(), before)
    best = (matrix - u[:, :16] * s[:16] @ v[:16]).norm()
    assert up.shape == (300, 16)
    assert (matrix - up @ down).norm() <= 1.01 * best
    assert torch.equal(up, factors(matrix, 16, "w")[0])


def refused(error: type[Exception], match: str, change: dict[str, Any], **options: Any) -> None:
    net, tau = linear_pair()
    tau = options.pop("tau", tau)
    model = adapted(net, **change)
    inner = INNER["SGD"](trained(model))
    with pytest.raises(error, match=match) as caught:
        pt.LoRAMerging(inner, model, tau, **options)
    assert "\n" not in str(caught.value)


def test_refused() -> None:
    refused(ArgumentError, "use_dora", {"use_dora": True})
    refused(ArgumentError, "adapter", {}, adapter="other")
    refused(ArgumentError, "mode", {}, mode="both")
    refused(ArgumentError, "rank", {}, rank=0)
    refused(ArgumentError, "density", {}, density=0.0)
    refused(ArgumentError, "total_steps", {}, pull=0.1)
    refused(ArgumentError, "pull", {}, pull=0.1, weight=0.1, total_steps=3)
    refused(ArgumentError, "tau", {}, tau=None)
    other = pt.TaskVector.between(base={"1.weight": torch.zeros(2)}, reference={"1.weight": torch.ones(2)})
    refused(MismatchError, "without a task vector", {}, tau=other)


def test_the_optimizers_of_all_weights_point_here() -> None:
    net, tau = linear_pair()
    model = adapted(net)
    with pytest.raises(MismatchError, match="LoRAMerging"):
        pt.OnTIES(trained(model), tau)
    inner = torch.optim.SGD([*trained(model), ("extra", nn.Parameter(torch.ones(1)))], lr=0.1)
    with pytest.raises(ArgumentError, match="extra"):
        pt.LoRAMerging(inner, model, tau)


def test_state_of_another_kind_or_task_vector_is_refused() -> None:
    net, tau = linear_pair()
    model = adapted(net)
    inner = INNER["SGD"](trained(model))
    optimizer = pt.LoRAMerging(inner, model, tau, weight=0.1)
    with pytest.raises(StateError, match="without LoRAMerging"):
        optimizer.load_state_dict({"state": {}, "param_groups": [{"params": [0, 1], "param_names": list("ab")}]})
    saved = optimizer.state_dict()
    saved["param_groups"][0] = {**saved["param_groups"][0], "tau_fingerprint": "f" * 32}
    with pytest.raises(StateError, match="task vector"):
        optimizer.load_state_dict(saved)


# -- a language model: training with TRL, saving, exporting ---------------------------------------------------


def lora_config() -> Any:
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")


@pytest.fixture
def aligned(world: Path, tmp_path: Path) -> tuple[Any, Any, Path]:
    """A policy after four steps of DPO with LoRA beside τ, in memory and saved."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    logging.getLogger("paretune").setLevel(logging.WARNING)
    tau = pt.TaskVector.between(base=world / "base", reference=world / "reference")
    model = AutoModelForCausalLM.from_pretrained(world / "reference", dtype=torch.float32)
    arguments = DPOConfig(
        output_dir=str(tmp_path / "run"), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2,
        report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, save_steps=2,
    )  # fmt: skip
    trainer = DPOTrainer(
        model, args=arguments, train_dataset=datasets.Dataset.from_list(rows("dpo", 8)),
        processing_class=AutoTokenizer.from_pretrained(world / "reference"), peft_config=lora_config(),
    )  # fmt: skip
    pt.attach(
        trainer,
        lambda groups, total_steps: pt.LoRAMerging(
            torch.optim.AdamW(groups), trainer.model, tau, pull=0.5, total_steps=total_steps, rank=None
        ),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    return trainer, world, tmp_path


def test_trained_with_trl_and_exported(aligned: tuple[Any, Any, Path], capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    trainer, world, folder = aligned
    tokens = torch.arange(20).view(2, 10)
    model = trainer.model.eval()
    with torch.no_grad():
        want = model(tokens).logits
        reference = AutoModelForCausalLM.from_pretrained(world / "reference", dtype=torch.float32).eval()
        with model.disable_adapter():
            assert torch.equal(model(tokens).logits, reference(tokens).logits), "the reference's drift is exactly 0"
    for saved in (folder / "adapter", folder / "run" / "checkpoint-2"):
        gate = Gate.read(saved)
        assert gate is not None
        assert gate.gate == pytest.approx(0.5 if saved.name == "adapter" else 0.25)
    assert main(["export-adapter", str(folder / "adapter"), "-o", str(folder / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gate"] == pytest.approx(0.5)
    with torch.no_grad():
        got = AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.float32).eval()(tokens).logits
    assert (got - want).abs().max() < 1e-5
    assert (reference(tokens).logits - want).abs().max() > 1e-2

    assert main(["export-adapter", str(folder / "adapter"), "-o", str(folder / "plain"), "--gate", "0"]) == 0
    other = make_model(seed=9)
    other.save_pretrained(folder / "stranger")
    line = ["export-adapter", str(folder / "adapter"), "-o", str(folder / "no"), "--base", str(folder / "stranger")]
    assert main(line) == 2
    assert "task vector" in capsys.readouterr().err
    (folder / "adapter" / GATE_FILE).write_text("{}")
    assert main(["export-adapter", str(folder / "adapter"), "-o", str(folder / "no")]) == 2
    (folder / "adapter" / GATE_FILE).unlink()
    assert main(["export-adapter", str(folder / "adapter"), "-o", str(folder / "no"), "--gate", "0.1"]) == 2
    assert main(["export-adapter", str(world / "base"), "-o", str(folder / "no")]) == 2
    assert not (folder / "no").exists()
