"""mergekit's YAML, read as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from merge_models import CONFIG, SHAPES, family, read, tensors, write

import paretune as pt
from paretune.errors import ArgumentError, PareTuneError
from paretune.layers import layer_of, part_of
from paretune.merging.recipe import from_dict, load
from paretune.merging.settings import Partwise, Place, resolve


def run(root: Path, content: dict[str, Any], name: str = "out") -> dict[str, torch.Tensor]:
    file = root / f"{name}.yaml"
    file.write_text(yaml.safe_dump(content))
    pt.merge(str(file), out=root / name)
    return read(root / name)


def test_models_gradients_and_filters(tmp_path: Path) -> None:
    a, b = family(tmp_path, 1, torch.float32)
    weight = [{"filter": "norm", "value": 0.5}, {"filter": "mlp", "value": [1.0, 0.0]}, {"value": 0.25}]
    found = run(
        tmp_path,
        {
            "merge_method": "linear",
            "models": [{"model": a, "parameters": {"weight": weight}}, {"model": b, "parameters": {"weight": 1}}],
            "parameters": {"normalize": False},
            "dtype": "float32",
        },
    )
    x, y = tensors(0, torch.float32), tensors(1, torch.float32)
    for name, value in found.items():
        share = 0.5 if "norm" in name else {None: 0.25, 0: 1.0, 1: 0.0}[layer_of(name)]
        torch.testing.assert_close(value, share * x[name] + y[name])


def test_slices_put_layers_in_a_new_order(tmp_path: Path) -> None:
    a, b = family(tmp_path, 1)
    found = run(
        tmp_path,
        {
            "merge_method": "passthrough",
            "slices": [
                {"sources": [{"model": a, "layer_range": [0, 2]}]},
                {"sources": [{"model": b, "layer_range": [0, 1]}]},
            ],
        },
    )
    x, y = tensors(0), tensors(1)
    name = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(found[name.format(1)], x[name.format(1)])
    assert torch.equal(found[name.format(2)], y[name.format(0)])
    assert torch.equal(found["model.embed_tokens.weight"], x["model.embed_tokens.weight"])
    assert torch.equal(found["lm_head.weight"], y["lm_head.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 3


def test_slices_of_whole_ranges_are_the_models(tmp_path: Path) -> None:
    a, b = family(tmp_path, 1)
    common = {"merge_method": "slerp", "base_model": a, "dtype": "bfloat16", "parameters": {"t": 0.3}}
    sources = [{"model": each, "layer_range": [0, 2]} for each in (a, b)]
    one = run(tmp_path, common | {"slices": [{"sources": sources}]}, "slices")
    two = run(tmp_path, common | {"models": [{"model": a}, {"model": b}]}, "models")
    assert all(torch.equal(one[name], two[name]) for name in SHAPES)


def test_the_base_among_the_models_adds_nothing(tmp_path: Path) -> None:
    base, a, b = family(tmp_path, 2)
    content = {
        "merge_method": "ties",
        "base_model": base,
        "parameters": {"int8_mask": True, "density": 0.5},
        "models": [{"model": a, "parameters": {"weight": 0.5}}, {"model": b, "parameters": {"weight": 0.5}}],
    }
    one = run(tmp_path, content, "one")
    two = run(tmp_path, content | {"models": [{"model": base}, *content["models"]]}, "two")  # type: ignore[misc]
    assert all(torch.equal(one[name], two[name]) for name in SHAPES)


def test_mergekits_defaults() -> None:
    models = [{"model": "a"}, {"model": "b"}]
    dare = from_dict({"merge_method": "dare_linear", "base_model": "c", "models": models})
    assert dare.parameters == {"rescale": "l1", "density": 1.0}
    ties = from_dict({"merge_method": "ties", "base_model": "c", "models": models, "parameters": {"rescale": True}})
    assert ties.parameters["rescale"] == "l1"
    assert (
        from_dict({"merge_method": "linear", "models": ["a"], "dtype": "bfloat16", "out_dtype": "float32"}).dtype
        == "F32"
    )


MODELS = {"merge_method": "linear", "models": [{"model": "a"}]}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ([], "recipe"),
        ({}, "merge_method"),
        (MODELS | {"merge_method": "della"}, "merge_method"),
        (MODELS | {"modules": {}}, "modules"),
        (MODELS | {"chat_template": "auto"}, "chat_template"),
        (MODELS | {"tokenizer": {"source": "union", "tokens": {}}}, "tokenizer.tokens"),
        (MODELS | {"dtype": "int8"}, "dtype"),
        (MODELS | {"slices": []}, "models, slices"),
        ({"merge_method": "linear"}, "models, slices"),
        (MODELS | {"models": []}, "models"),
        (MODELS | {"models": [{"parameters": {}}]}, "model"),
        (MODELS | {"models": [{"model": "a", "weight": 1}]}, "models.weight"),
        (MODELS | {"models": [{"model": "a", "parameters": {"gamma": 1}}]}, "gamma"),
        (MODELS | {"models": [{"model": "a", "layer_range": [0, 1]}]}, "layer_range"),
        (MODELS | {"models": [{"model": {"model": {"path": "a", "revision": "x"}}}]}, "revision"),
        (MODELS | {"parameters": [1]}, "parameters"),
        (MODELS | {"parameters": {"epsilon": 1}}, "epsilon"),
        ({"merge_method": "ties", "models": [{"model": "a"}]}, "base"),
        ({"merge_method": "slerp", "models": [{"model": "a"}, {"model": "b"}]}, "base_model"),
        ({"merge_method": "slerp", "base_model": "a", "models": [{"model": c} for c in "abc"]}, "models"),
        ({"merge_method": "linear", "slices": [{"sources": [{"model": "a"}]}]}, "layer_range"),
        ({"merge_method": "linear", "slices": [{"sources": [{"model": "a", "layer_range": [3, 1]}]}]}, "layer_range"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_not_supported_is_named(content: Any, named: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        from_dict(content)
    assert caught.value.argument == named
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "a: [", "\x00", "- 1", "!!python/object/apply:os.system ['true']", "a: &a [*a]"])
def test_files_that_are_no_recipes(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(PareTuneError):
        load(tmp_path / "r.yaml")
    with pytest.raises(ArgumentError, match="cannot be read"):
        load(tmp_path / "absent.yaml")


def test_bad_values_are_found_before_anything_is_written(tmp_path: Path) -> None:
    (a,) = family(tmp_path, 0)
    for weight in ("heavy", [], [{"value": 1, "when": 2}], {"a": 1}, True):
        file = tmp_path / "r.yaml"
        file.write_text(
            yaml.safe_dump({"merge_method": "linear", "models": [{"model": a, "parameters": {"weight": weight}}]})
        )
        with pytest.raises(ArgumentError, match="weight"):
            pt.merge(str(file), out=tmp_path / "out")
    assert not (tmp_path / "out.merging").exists()


def tokenizer(directory: Path, tokens: list[str], added: dict[str, int] | None = None) -> None:
    content = {
        "model": {"type": "WordLevel", "vocab": {token: i for i, token in enumerate(tokens)}},
        "added_tokens": [{"content": token, "id": number} for token, number in (added or {}).items()],
    }
    (directory / "tokenizer.json").write_text(json.dumps(content))


def vocabulary_models(root: Path) -> tuple[str, str]:
    """Two models of 4 and 5 tokens in different orders; every row holds its token's own number."""
    values = {"the": 1.0, "cat": 2.0, "dog": 3.0, "sat": 4.0, "mat": 5.0}
    paths = []
    for name, tokens in (("a", ["the", "cat", "dog", "sat"]), ("b", ["sat", "mat", "the", "cat", "dog"])):
        rows = torch.tensor([[values[token]] * 3 for token in tokens])
        config = CONFIG | {"vocab_size": len(tokens)}
        path = write(root / name, {"embed.weight": rows, "layers.0.w": torch.ones(2)}, config=config)
        tokenizer(root / name, tokens)
        paths.append(path)
    return paths[0], paths[1]


@pytest.mark.parametrize(
    ("source", "rows"),
    [("base", [1, 2, 3, 4]), ("union", [1, 2, 3, 4, 5]), ("b", [4, 5, 1, 2, 3])],
)
def test_tokens_are_matched_by_name(source: str, rows: list[float], tmp_path: Path) -> None:
    """Both models agree on every token's row, so the merge has it too, in the chosen order."""
    a, b = vocabulary_models(tmp_path)
    source = b if source == "b" else source
    content = {
        "merge_method": "linear",
        "models": [{"model": a, "parameters": {"weight": 0.5}}, {"model": b, "parameters": {"weight": 0.5}}],
        "tokenizer_source": source,
    }
    found = run(tmp_path, content)
    assert found["embed.weight"][:, 0].tolist() == rows
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == len(rows)
    from paretune.merging.inputs import read_vocabulary

    names = read_vocabulary(tmp_path / "out" / "tokenizer.json")
    order = sorted(names, key=lambda token: names[token])
    assert [["the", "cat", "dog", "sat", "mat"].index(token) + 1 for token in order] == rows


def test_equal_tokenizers_change_nothing(tmp_path: Path) -> None:
    a, b = family(tmp_path, 1)
    for path in (a, b):
        tokenizer(Path(path), [f"t{i}" for i in range(37)], {"<eos>": 37})
    models = [{"model": a}, {"model": b}]
    one = run(tmp_path, {"merge_method": "linear", "models": models, "tokenizer_source": "union"}, "one")
    two = run(tmp_path, {"merge_method": "linear", "models": models}, "two")
    assert all(torch.equal(one[name], two[name]) for name in SHAPES)


def test_a_tokenizer_is_wanted(tmp_path: Path) -> None:
    a, b = family(tmp_path, 1)
    models = [{"model": a}, {"model": b}]
    with pytest.raises(PareTuneError, match=r"tokenizer\.json"):
        run(tmp_path, {"merge_method": "linear", "models": models, "tokenizer_source": "union"})
    tokenizer(Path(a), ["x"])
    tokenizer(Path(b), ["x"])
    with pytest.raises(ArgumentError, match="tokenizer_source"):
        run(tmp_path, {"merge_method": "linear", "models": models, "tokenizer_source": str(tmp_path / "no")}, "no")


def test_names() -> None:
    assert layer_of("h.11.attn.weight") == 11
    assert layer_of("encoder.block.2.layer.0.w") == 2
    assert layer_of("wte.weight") is None
    assert part_of("transformer.ln_f.weight") == "norms"
    assert part_of("model.embed_tokens.weight") == "embeddings"
    assert Partwise((0.1, 0.9), (0,)).weight("layers.1.w") == 0.9
    assert resolve("t", Place("x", 0.25), [{}, {"t": [0.0, 1.0, 5.0]}]) == 0.5
    assert resolve("t", Place("x", 1.0), [{"t": [{"filter": "y", "value": 1}]}, {"t": 2}]) == 2
