"""Against mergekit, run as it is by its own python: PARETUNE_MERGEKIT_PYTHON.

``benchmarks/merge/mergekit_env.sh DIRECTORY`` makes such an environment.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from merge_models import read, write
from torch import Tensor

import paretune as pt

PYTHON = os.environ.get("PARETUNE_MERGEKIT_PYTHON", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="PARETUNE_MERGEKIT_PYTHON does not name a python with mergekit")
HIDDEN, LAYERS, VOCABULARY = 64, 2, 96
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
}


def llama(seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "lm_head.weight": (VOCABULARY, HIDDEN),
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (96, HIDDEN) for name in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (HIDDEN, 96)
        shapes |= {f"{prefix}{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    base, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=base)
        if seed:
            value = value + 0.1 * torch.randn(shape, generator=own)
        found[name] = value.to(dtype)
    return found


def recipes(root: Path) -> dict[str, dict[str, Any]]:
    """Recipe by name; those that start with f32 merge float32 models, the others bf16 ones."""
    found: dict[str, dict[str, Any]] = {}
    for kind in ("bf16", "f32"):
        base, a, b = (str(root / f"{kind}-{seed}") for seed in range(3))

        def entry(model: str, **parameters: Any) -> dict[str, Any]:
            return {"model": model, "parameters": parameters} if parameters else {"model": model}

        def layers(model: str, start: int, stop: int) -> dict[str, Any]:
            return {"model": model, "layer_range": [start, stop]}

        def add(name: str, kind: str = kind, **content: Any) -> None:
            found[f"{kind}-{name}"] = content | {"dtype": {"bf16": "bfloat16", "f32": "float32"}[kind]}

        add("quarters", merge_method="linear", models=[entry(base, weight=0.25), entry(a, weight=0.75)])
        add("soup", merge_method="linear", models=[entry(m, weight=w) for m, w in ((base, 1), (a, 1), (b, 2))])
        add(
            "sum",
            merge_method="linear",
            models=[entry(base, weight=0.5), entry(a, weight=0.25)],
            parameters={"normalize": False},
        )
        add("gradient", merge_method="linear", models=[entry(base, weight=[0, 1]), entry(a, weight=[1, 0])])
        mlp = {"filter": "mlp", "value": 0.25}
        add(
            "filter",
            merge_method="linear",
            models=[entry(base, weight=[mlp, {"value": 0.5}]), entry(a, weight=0.75)],
            parameters={"normalize": False},
        )
        pair = [entry(a, weight=0.5, density=0.3), entry(b, weight=0.25, density=0.3)]
        add("arithmetic", merge_method="task_arithmetic", base_model=base, models=pair_without(pair))
        add(
            "lambda",
            merge_method="task_arithmetic",
            base_model=base,
            models=pair_without(pair),
            parameters={"lambda": 0.5},
        )
        add("slerp", merge_method="slerp", base_model=base, models=[entry(base), entry(a)], parameters={"t": 0.3})
        add("nuslerp", merge_method="nuslerp", models=[entry(a, weight=0.3), entry(b, weight=0.7)])
        add(
            "passthrough",
            merge_method="passthrough",
            slices=[{"sources": [layers(base, 0, 2)]}, {"sources": [layers(a, 1, 2)]}],
        )
        add(
            "slices",
            merge_method="slerp",
            base_model=base,
            slices=[
                {"sources": [layers(base, i, i + 1), layers(a, i, i + 1)], "parameters": {"t": 0.25 + i / 2}}
                for i in (0, 1)
            ],
        )
        if kind == "f32":  # bf16 task vectors tie, and the two choose among ties differently
            add("ties", merge_method="ties", base_model=base, models=pair)
            add("ties-sum", merge_method="ties", base_model=base, models=pair, parameters={"normalize": False})
            add("ties-rescaled", merge_method="ties", base_model=base, models=pair[:1], parameters={"rescale": True})
            whole = [entry(m, weight=w, density=1.0) for m, w in ((a, 0.5), (b, 0.25))]
            add("dare-whole", merge_method="dare_ties", base_model=base, models=whole)
    return found


def pair_without(pair: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The models with weights alone."""
    return [{"model": each["model"], "parameters": {"weight": each["parameters"]["weight"]}} for each in pair]


EXACT = ("quarters", "soup", "sum", "gradient", "filter", "passthrough")


def test_every_recipe(tmp_path: Path) -> None:
    for kind, dtype in (("bf16", torch.bfloat16), ("f32", torch.float32)):
        for seed in range(3):
            write(tmp_path / f"{kind}-{seed}", llama(seed, dtype), config=CONFIG)
    arguments = []
    every = recipes(tmp_path)
    for name, content in every.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
        arguments += [str(tmp_path / f"{name}.yaml"), str(tmp_path / f"{name}-theirs")]
    driver = Path(__file__).with_name("mergekit_driver.py")
    done = subprocess.run([PYTHON, str(driver), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    wrong = []
    for name in every:
        pt.merge(str(tmp_path / f"{name}.yaml"), out=tmp_path / f"{name}-ours")
        ours, theirs = read(tmp_path / f"{name}-ours"), read(tmp_path / f"{name}-theirs")
        assert ours.keys() == theirs.keys(), name
        kind = name.split("-")[0]
        unit = {"bf16": 2.0**-8, "f32": 2.0**-24}[kind]
        # Rounding is measured against the inputs: mergekit rounds differences and products too, where we round once.
        allowed = 0.0 if name.removeprefix(f"{kind}-") in EXACT and (kind == "bf16" or "soup" not in name) else 8 * unit
        worst = max(
            float((ours[t].double() - theirs[t].double()).abs().max() / theirs[t].double().abs().max()) for t in ours
        )
        if worst > allowed:
            wrong.append((name, worst / unit))
    assert not wrong
    assert len(every) > 20
