"""Parametrisations, blocks, and learning where the best ratios are known."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from averaging_models import save_ends, token_rows
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import paretune as pt
from paretune.averaging.blocks import lay_out
from paretune.averaging.parametrization import normalized, penalty_weights, project

SHAPES = {
    "model.embed_tokens.weight": (9, 4),
    **{f"model.layers.{i}.self_attn.q_proj.weight": (4, 4) for i in range(26)},
    **{f"model.layers.{i}.self_attn.q_proj.bias": (4,) for i in range(26)},
    **{f"model.layers.{i}.mlp.up_proj.weight": (8, 4) for i in range(26)},
    **{f"model.layers.{i}.input_layernorm.weight": (4,) for i in range(26)},
    "model.norm.weight": (4,),
    "lm_head.weight": (9, 4),
}


def test_published_normalization_by_hand() -> None:
    """α₀ = 0.2, K = 3, ε = 0.2, σ(0) = 1/2, σ(ln 3) = 3/4, σ(−ln 3) = 1/4: sums to 2.1."""
    found = normalized(torch.tensor([0.0, math.log(3), -math.log(3)], dtype=torch.float64), 0.2, 0.2)
    wanted = [0.2 * 3 * part / 2.1 for part in (0.7, 0.95, 0.45)]
    assert found.tolist() == pytest.approx(wanted, abs=1e-12)
    assert normalized(torch.tensor([9.0, -9.0, -9.0]), 0.9)[0] > 1  # what the projection is for


@given(
    st.lists(st.floats(-3, 3), min_size=1, max_size=7),
    st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0, 0.5])),
)
def test_projection_properties(values: list[float], mean: float) -> None:
    found = project(torch.tensor(values, dtype=torch.float64), mean)
    assert found.mean().item() == pytest.approx(mean, abs=1e-9)
    assert 0 <= found.min() <= found.max() <= 1
    again = project(found, mean)
    torch.testing.assert_close(again, found, rtol=0, atol=1e-9)


def test_projection_is_the_nearest_point() -> None:
    """Against a general solver of min ‖α − v‖² with the same constraints."""
    from scipy.optimize import minimize

    rng = np.random.default_rng(0)
    for _ in range(25):
        count, mean = int(rng.integers(2, 8)), float(rng.uniform(0, 1))
        v = rng.normal(size=count)
        solved = minimize(
            lambda x, v=v: ((x - v) ** 2).sum(),
            np.full(count, mean),
            jac=lambda x, v=v: 2 * (x - v),
            bounds=[(0, 1)] * count,
            constraints={"type": "eq", "fun": lambda x, mean=mean: x.mean() - mean},
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        assert project(torch.from_numpy(v), mean).numpy() == pytest.approx(solved.x, abs=1e-6)


def test_blocks() -> None:
    thirds = lay_out(SHAPES, 3)
    assert [(group.layers[0], group.layers[-1]) for group in thirds.groups] == [(0, 7), (8, 16), (17, 25)]
    given_pivots = lay_out(SHAPES, pivots=(10, 20))
    assert [(group.layers[0], group.layers[-1]) for group in given_pivots.groups] == [(0, 10), (11, 20), (21, 25)]
    assert len(lay_out(SHAPES, "layer").groups) == 26
    kinds = lay_out(SHAPES, "module")
    assert [group.kind for group in kinds.groups] == ["self_attn.q_proj", "mlp.up_proj"]
    assert kinds.block["model.layers.4.self_attn.q_proj.bias"] == kinds.block["model.layers.9.self_attn.q_proj.weight"]
    for layout in (thirds, kinds):
        assert layout.block.keys() | layout.part.keys() == SHAPES.keys()
        assert not layout.block.keys() & layout.part.keys()
    assert lay_out(SHAPES, 3, head="last").block["lm_head.weight"] == 2
    for wrong in (
        {"blocks": 0}, {"blocks": 27}, {"blocks": "row"}, {"pivots": (20, 10)}, {"pivots": (25,)}, {"pivots": (-1, 3)},
        {"head": "first"},
    ):  # fmt: skip
        with pytest.raises(pt.ArgumentError):
            lay_out(SHAPES, **wrong)  # type: ignore[arg-type]


def test_penalty_weights() -> None:
    """Released: 25/(|l − 13| + 1) for each matrix of a layer (two here), the head as layer 26 of the last block."""
    layout = lay_out(SHAPES, 3, head="last")
    wanted = [2 * sum(25 / (abs(layer - 13) + 1) for layer in group.layers) for group in layout.groups]
    wanted[2] += 25 / 14
    assert penalty_weights("released", layout).tolist() == pytest.approx(wanted)
    assert penalty_weights("l1", layout).tolist() == [1, 1, 1]
    depth = penalty_weights("depth", layout).tolist()
    assert depth == pytest.approx(
        [sum(25 / (abs(i - 13) + 1) for i in g.layers) / len(g.layers) for g in layout.groups]
    )
    with pytest.raises(pt.ArgumentError, match="penalty"):
        penalty_weights("l2", layout)


def test_by_hand_states_every_tensor(tmp_path: Path) -> None:
    ratios = pt.Ratios.by_hand(SHAPES, ratios=(0.4, 0.3, 0.2), pivots=(10, 20), embeddings=1.0)
    assert ratios.tensors.keys() == SHAPES.keys()
    assert ratios.tensors["model.layers.10.mlp.up_proj.weight"] == 0.4  # pivots are inclusive
    assert ratios.tensors["model.layers.11.mlp.up_proj.weight"] == 0.3
    assert ratios.tensors["model.layers.21.self_attn.q_proj.bias"] == 0.2
    assert ratios.tensors["model.embed_tokens.weight"] == 1.0
    for name in ("model.norm.weight", "model.layers.3.input_layernorm.weight", "lm_head.weight"):
        assert ratios.tensors[name] == pytest.approx(0.3)
    ratios.save(tmp_path / "ratios.json")
    assert pt.Ratios.load(tmp_path / "ratios.json") == ratios
    tied = pt.Ratios.by_hand(SHAPES, ratios=[0.1], embeddings=0.5, tied={"lm_head.weight": "model.embed_tokens.weight"})
    assert tied.tensors["lm_head.weight"] == tied.tensors["model.embed_tokens.weight"] == 0.5
    assert tied.head is None
    with pytest.raises(pt.ArgumentError, match="tied"):
        pt.Ratios.by_hand(SHAPES, ratios=[0.1], head=0.5, tied={"lm_head.weight": "model.embed_tokens.weight"})
    with pytest.raises(pt.ArgumentError, match="3 blocks"):
        pt.Ratios.by_hand(SHAPES, ratios=[0.1, 0.2], pivots=(10, 20))
    (tmp_path / "broken.json").write_text('{"mean": 0.2}')
    for name in ("broken.json", "absent.json"):
        with pytest.raises(pt.ArgumentError, match=name):
            pt.Ratios.load(tmp_path / name)


class Chain(torch.nn.Module):
    """Six layers of one number each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(1, 1, bias=False) for _ in range(6))


def chain_ends(directory: Path) -> dict[str, str]:
    """θ_post = 0 and θ_pre = 1: the parameters are the ratios."""
    for name, value in (("pre", 1.0), ("post", 0.0)):
        tensors = {f"layers.{i}.weight": torch.full((1, 1), value) for i in range(6)}
        save_file(tensors, directory / f"{name}.safetensors")
    return {name: str(directory / f"{name}.safetensors") for name in ("pre", "post")}


@pytest.mark.parametrize("parametrization", ["sigmoid", "projection"])
def test_known_best_ratios_are_found(parametrization: str, tmp_path: Path) -> None:
    """The loss is a distance to given ratios of the right mean: they are the optimum, and reached."""
    best = torch.tensor([0.35, 0.2, 0.05])
    ratios = pt.learn_ratios(
        **chain_ends(tmp_path), model=Chain(), data=[best], blocks=3, mean=0.2, penalty="none", steps=400, lr=0.05,
        parametrization=parametrization, epsilon=0.0,
        loss=lambda m, b: sum((m.layers[2 * k + i].weight - b[k]).square().sum() for k in range(3) for i in range(2)),
    )  # fmt: skip
    assert ratios.ratios == pytest.approx(best.tolist(), abs=2e-3)
    assert math.fsum(ratios.ratios) / 3 == pytest.approx(0.2, abs=1e-6)


def test_projection_finds_the_constrained_optimum(tmp_path: Path) -> None:
    """Targets of another mean and outside [0, 1]: the answer is their projection."""
    target = torch.tensor([1.9, 0.7, -0.8])
    ratios = pt.learn_ratios(
        **chain_ends(tmp_path), model=Chain(), data=[target], blocks=3, mean=0.5, penalty="none", steps=400, lr=0.05,
        parametrization="projection",
        loss=lambda m, b: sum((m.layers[2 * k + i].weight - b[k]).square().sum() for k in range(3) for i in range(2)),
    )  # fmt: skip
    assert ratios.ratios == pytest.approx(project(target, 0.5).tolist(), abs=2e-3)
    assert all(0 <= record_ratio <= 1 for record in ratios.history for record_ratio in record["ratios"])


def test_a_strong_penalty_keeps_the_mean(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        **chain_ends(tmp_path), "data": [torch.tensor([0.4, 0.1, 0.1])], "blocks": 3, "mean": 0.2, "steps": 200,
        "loss": lambda m, b: sum((m.layers[2 * k].weight - b[k]).square().sum() for k in range(3)),
    }  # fmt: skip
    free = pt.learn_ratios(model=Chain(), penalty="none", **options)
    held = pt.learn_ratios(model=Chain(), penalty="l1", penalty_weight=10.0, **options)
    assert max(free.ratios) - min(free.ratios) > 0.25
    assert max(held.ratios) - min(held.ratios) < 0.05


def test_steps_shrink_as_a_cosine(tmp_path: Path) -> None:
    """A loss that is linear in the ratios: all steps have one direction, and the length of the step size."""
    steps, peak = 10, 0.01
    ratios = pt.learn_ratios(
        **chain_ends(tmp_path), model=Chain(), data=[0], blocks=3, mean=0.5, penalty="none", steps=steps, lr=peak,
        parametrization="projection",
        loss=lambda m, _: sum((3 + (i == 0) - (i == 5)) * layer.weight.sum() for i, layer in enumerate(m.layers)),
    )  # fmt: skip
    firsts = [record["ratios"][0] for record in ratios.history] + [ratios.ratios[0]]
    moved = [before - after for before, after in itertools.pairwise(firsts)]
    shape = [(1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)]
    assert moved == pytest.approx([peak * math.sqrt(1.5) * part for part in shape], rel=1e-5)  # of (7, 6, 5) − 6


def test_the_loss_is_nats_a_token(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    pre, post = (AutoModelForCausalLM.from_pretrained(path) for path in save_ends(tmp_path, "llama"))
    rows = token_rows(12)
    ratios = pt.learn_ratios(
        pre=tmp_path / "pre", post=tmp_path / "post", data=rows, steps=1, batch_size=12, micro_batch=5, penalty="none"
    )
    with torch.no_grad():
        for mine, other in zip(post.parameters(), pre.parameters(), strict=True):
            mine.lerp_(other, 0.2)
        losses = []
        for row in rows:
            logps = post(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
            mask = row.get("completion_mask", [1] * len(row["input_ids"]))
            learned = [at for at in range(1, len(mask)) if mask[at]]
            losses += [-float(logps[at - 1, row["input_ids"][at]]) for at in learned]
    assert ratios.history[0]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_extrapolation_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", "paretune"):
        ratios = pt.learn_ratios(
            **chain_ends(tmp_path), model=Chain(), data=[0], blocks=3, mean=0.9, penalty="none", steps=100, lr=0.5,
            loss=lambda m, _: -m.layers[0].weight.sum(),
        )  # fmt: skip
    assert ratios.extrapolates
    assert "extrapolated" in caplog.text


def test_learning_is_deterministic_and_micro_batches_change_nothing(tmp_path: Path) -> None:
    pre, post = save_ends(tmp_path, "llama")
    options: dict[str, Any] = {"pre": pre, "post": post, "data": token_rows(12), "steps": 4, "batch_size": 6, "seed": 1}
    first, again, micro = (pt.learn_ratios(**options, micro_batch=size) for size in (None, None, 2))
    assert first.ratios == again.ratios
    assert micro.ratios == pytest.approx(first.ratios, abs=1e-4)
    assert len(first.history) == 4
    assert first.history[0]["ratios"] == pytest.approx([0.2, 0.2, 0.2])
    content = first.to_dict()
    assert set(content["blocks"][0]) == {"layers", "ratio"}
    assert [layer for block in content["blocks"] for layer in block["layers"]] == [0, 1, 2, 3]
    assert content["tensors"].keys() == load_file(f"{pre}/model.safetensors").keys()
    json.dumps(content)


def test_wrong_pairs_are_refused_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    for kind in ("llama", "gpt2"):
        save_ends(tmp_path / kind, kind)
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model is loaded")
    )
    llama = tmp_path / "llama" / "pre"
    other = {
        "model.embed_tokens.weight": (44, 16), "lm_head.weight": (44, 16), "model.layers.0.mlp.up_proj.weight": (9, 16)
    }  # fmt: skip
    for name, changed in (("vocabulary", list(other)[:2]), ("shape", list(other)[2:])):
        tensors = load_file(llama / "model.safetensors") | {key: torch.zeros(other[key]) for key in changed}
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    for post, said in (
        (tmp_path / "gpt2" / "pre", "architecture"), (tmp_path / "vocabulary", "vocabulary"),
        (tmp_path / "shape", "shape"),
    ):  # fmt: skip
        with pytest.raises(pt.MismatchError, match=said):
            pt.learn_ratios(pre=llama, post=post, data=token_rows())
    (tmp_path / "gpt2" / "post" / "config.json").unlink()
    with pytest.raises(pt.MismatchError, match="lacks"):
        pt.learn_ratios(pre=llama, post=tmp_path / "gpt2" / "post", data=token_rows())
    with pytest.raises(pt.ArgumentError, match="same checkpoint"):
        pt.learn_ratios(pre=llama, post=llama, data=token_rows())
    for wrong in (
        {"mean": 1.5}, {"mean": float("nan")}, {"steps": 0}, {"lr": 0.0}, {"penalty": "l3"}, {"epsilon": -1.0},
        {"parametrization": "softmax"}, {"blocks": 9}, {"head": float("inf")}, {"micro_batch": 0}, {"max_length": 1},
        {"batch_size": 0},
    ):  # fmt: skip
        with pytest.raises(pt.ArgumentError):
            pt.learn_ratios(**{"pre": llama, "post": tmp_path / "llama" / "post", "data": token_rows(), **wrong})
    for data in ([], [{"question": "a"}], [{"input_ids": [3], "completion_mask": [1]}], tmp_path / "absent.jsonl"):
        with pytest.raises(pt.DataError):
            pt.learn_ratios(pre=llama, post=tmp_path / "llama" / "post", data=data)
