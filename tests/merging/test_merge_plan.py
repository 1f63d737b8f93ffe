"""What does not fit is refused before anything is written; what fits is matched by name."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from merge_models import CONFIG, SHAPES, content, family, read, tensors, write
from safetensors.torch import load_file, save_file

import paretune as pt
from paretune.errors import ArgumentError, CheckpointError, MismatchError, PareTuneError


def refuse(kind: type[PareTuneError], out: Path, *arguments: Any, **options: Any) -> str:
    """The merge is refused in one line, and nothing is left behind."""
    with pytest.raises(kind) as caught:
        pt.merge(*arguments, out=out, **options)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    assert not out.exists() or not any(out.iterdir()) or kind is ArgumentError
    assert not out.with_name(out.name + ".merging").exists()
    return message


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_layout_gives_the_same_bytes(data: st.DataObject, tmp_path: Path) -> None:
    """Shapes, dtypes, shards of the inputs, shards of the output, workers and chunks: the values never change."""
    root = Path(tempfile.mkdtemp(dir=tmp_path))
    count = data.draw(st.integers(1, 6))
    sizes = st.lists(st.integers(0, 30), min_size=0, max_size=3)
    shapes = {f"t.{i}.w": tuple(data.draw(sizes)) for i in range(count)}
    if data.draw(st.booleans()):
        shapes["long"] = (3 * 65536 + data.draw(st.integers(0, 70)),)
    dtypes = [data.draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32])) for _ in range(3)]
    method = data.draw(st.sampled_from(["linear", "task_arithmetic", "dare_ties", "ties", "nuslerp"]))
    results = []
    for layout in range(2):
        shards = [data.draw(st.integers(1, len(shapes))) for _ in range(3)]
        base, a, b = (write(root / f"{layout}-{i}", tensors(i, dtypes[i], shapes), shards[i]) for i in range(3))
        pt.merge(
            method,
            {a: 0.6, b: 0.3},
            None if method == "linear" else base,
            root / f"out{layout}",
            workers=data.draw(st.integers(1, 3)),
            chunk=65536 * data.draw(st.integers(1, 4)),
            shard_bytes=data.draw(st.sampled_from([1, 1000, 10**9])),
        )
        results.append(read(root / f"out{layout}"))
    assert results[0].keys() == results[1].keys() == shapes.keys()
    for name in shapes:
        one, two = (result[name].reshape(-1).view(torch.uint8) for result in results)
        assert results[0][name].shape == shapes[name]
        assert torch.equal(one, two)
    shutil.rmtree(root)


def test_every_byte_is_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    base, a, b = family(tmp_path, 2, shapes=SHAPES | {"model.layers.1.big": (1000, 3000)})
    results = []
    for workers, chunk in ((1, 1), (3, 1), (2, 7)):
        out = tmp_path / "out"
        pt.merge("ties", {a: 0.5, b: 0.5}, base, out, workers=workers, chunk=chunk * 65536)
        results.append(content(out))
        shutil.rmtree(out)
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("what", ["missing", "extra", "shape", "vocabulary", "integers"])
def test_mismatches(what: str, tmp_path: Path) -> None:
    values = tensors(1)
    config = dict(CONFIG)
    if what == "missing":
        del values["model.norm.weight"]
    elif what == "extra":
        values["model.other.weight"] = torch.zeros(2)
    elif what == "shape":
        values["model.layers.0.mlp.up_proj.weight"] = torch.zeros(48, 17).bfloat16()
    elif what == "vocabulary":
        values |= {n: torch.zeros(41, 16).bfloat16() for n in ("lm_head.weight", "model.embed_tokens.weight")}
        config["vocab_size"] = 41
    first = tensors(0)
    if what == "integers":
        first["ids"], values["ids"] = torch.arange(4), torch.arange(4) + 1
    a, b = write(tmp_path / "a", first), write(tmp_path / "b", values, config=config)
    message = refuse(MismatchError, tmp_path / "out", "linear", [a, b])
    expected = {
        "missing": "model.norm.weight",
        "extra": "model.other.weight",
        "shape": "[48, 17]",
        "vocabulary": "vocab=pad",
        "integers": "ids",
    }
    assert expected[what] in message


def test_whole_numbers_are_copied(tmp_path: Path) -> None:
    values = [tensors(seed) | {"ids": torch.arange(7)} for seed in (0, 1)]
    a, b = (write(tmp_path / str(i), v) for i, v in enumerate(values))
    pt.merge("linear", [a, b], out=tmp_path / "out")
    assert torch.equal(read(tmp_path / "out")["ids"], torch.arange(7))


@pytest.mark.parametrize("vocab", ["pad", "truncate"])
def test_vocabularies_are_resized_when_asked(vocab: str, tmp_path: Path) -> None:
    """Rows that the base lacks have the tuned model's own value: their task vector is 0 there."""
    base = write(tmp_path / "base", tensors(0, torch.float32))
    shapes = SHAPES | {"model.embed_tokens.weight": (43, 16), "lm_head.weight": (43, 16)}
    tuned = tensors(1, torch.float32, shapes)
    a = write(tmp_path / "a", tuned, config=CONFIG | {"vocab_size": 43})
    pt.merge("task_arithmetic", {a: 0.5}, base, tmp_path / "out", vocab=vocab)
    found = read(tmp_path / "out")
    rows = 43 if vocab == "pad" else 40
    assert found["lm_head.weight"].shape == (rows, 16)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == rows
    low, high = load_file(tmp_path / "base" / "model.safetensors")["lm_head.weight"], tuned["lm_head.weight"]
    torch.testing.assert_close(found["lm_head.weight"][:40], low + 0.5 * (high[:40] - low))
    assert torch.equal(found["lm_head.weight"][40:], high[40:rows])


def test_tied_heads(tmp_path: Path) -> None:
    """A copy of the embedding stored as head is left out; a head of one's own is kept and the result untied."""
    tied = {n: t for n, t in tensors(0, torch.float32).items() if n != "lm_head.weight"}
    a = write(tmp_path / "a", tied, config=CONFIG | {"tie_word_embeddings": True})
    copied = {n: t for n, t in tensors(1, torch.float32).items() if n != "lm_head.weight"}
    copied["lm_head.weight"] = copied["model.embed_tokens.weight"].clone()
    b = write(tmp_path / "b", copied, config=CONFIG | {"tie_word_embeddings": True})
    report = pt.merge("linear", [a, b], out=tmp_path / "tied")
    assert "lm_head.weight" not in read(tmp_path / "tied")
    assert "lm_head.weight" in " ".join(report.notes)
    own = copied | {"lm_head.weight": torch.ones(40, 16)}
    c = write(tmp_path / "c", own)
    pt.merge("linear", [a, c], out=tmp_path / "untied")
    found = read(tmp_path / "untied")
    torch.testing.assert_close(found["lm_head.weight"], 0.5 * (tied["model.embed_tokens.weight"] + 1))
    assert json.loads((tmp_path / "untied" / "config.json").read_text())["tie_word_embeddings"] is False


def test_outputs_that_exist(tmp_path: Path) -> None:
    a, b = family(tmp_path, 1)
    out = tmp_path / "out"
    out.mkdir()
    pt.merge("linear", [a, b], out=out)  # an empty directory is as good as none
    before = content(out)
    assert "not empty" in refuse(ArgumentError, out, "linear", [a, b])
    assert content(out) == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArgumentError, match="is a file"):
        pt.merge("linear", [a, b], out=tmp_path / "file")


def test_too_little_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = family(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "GB are free" in refuse(ArgumentError, tmp_path / "out", "linear", [a, b])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"method": "karcher"}, "method"),
        ({"density": 0.0}, "density"),
        ({"density": 1.5}, "density"),
        ({"rescale": "l2"}, "rescale"),
        ({"dtype": "float8_e4m3fn"}, "dtype"),
        ({"workers": 0}, "workers"),
        ({"chunk": 1000}, "chunk"),
        ({"vocab": "grow"}, "vocab"),
        ({"base": None}, "base"),
        ({"models": {}}, "models"),
        ({"models": {"WEIGHTED": "much"}}, "weight"),
        ({"models": {"WEIGHTED": float("nan")}}, "weight"),
        ({"t": 0.5}, "t"),
        ({"sweep": {"weight": []}}, "sweep"),
        ({"sweep": {"seed": [1, 2]}}, "sweep"),
        ({"shard_bytes": 0}, "shard_bytes"),
        ({"ratios": (0.1, 0.2)}, "ratios"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_arguments(options: dict[str, Any], named: str, tmp_path: Path) -> None:
    base, a, b = family(tmp_path, 2)
    given: dict[str, Any] = {"method": "ties", "models": {a: 0.5, b: 0.5}, "base": base} | options
    if "WEIGHTED" in str(given["models"]):
        given["models"] = {a: next(iter(given["models"].values()))}
    with pytest.raises(ArgumentError) as caught:
        pt.merge(out=tmp_path / "out", **given)
    assert str(caught.value).startswith(named)
    assert not (tmp_path / "out.merging").exists() or not any((tmp_path / "out.merging").glob("*.partial"))


@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear", "slerp"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(method: str, value: float, tmp_path: Path) -> None:
    bad = tensors(1)
    bad["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    a, b = write(tmp_path / "a", tensors(0)), write(tmp_path / "b", bad, 2)
    base = write(tmp_path / "base", tensors(2)) if method in ("ties", "dare_linear") else None
    with pytest.raises(CheckpointError) as caught:
        pt.merge(method, {a: 0.5, b: 0.5}, base, tmp_path / "out", **({"density": 0.01} if base else {}))
    file = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())["weight_map"]
    for part in (
        "model.layers.1.mlp.up_proj.weight",
        f"b/{file['model.layers.1.mlp.up_proj.weight']}",
        "allow_non_finite",
    ):
        assert part in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_is_not_finite_passes_when_allowed(tmp_path: Path) -> None:
    bad = tensors(1)
    bad["model.norm.weight"][:2] = torch.tensor([float("nan"), float("inf")])
    a, b = write(tmp_path / "a", tensors(0)), write(tmp_path / "b", bad)
    pt.merge("linear", [a, b], out=tmp_path / "out", allow_non_finite=True)
    found = read(tmp_path / "out")["model.norm.weight"]
    assert found[0].isnan()
    assert found[1].isinf()
    assert found[2:].isfinite().all()


def test_an_overflow_is_no_infinity(tmp_path: Path) -> None:
    a = write(tmp_path / "a", {"w": torch.full((4,), 60000.0)})
    with pytest.raises(CheckpointError, match="overflows F16"):
        pt.merge("linear", {a: 2.0}, out=tmp_path / "out", normalize=False, dtype="float16")


def adapter(directory: Path, config: dict[str, Any], values: dict[str, torch.Tensor]) -> str:
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 8} | config))
    save_file(values, directory / "adapter_model.safetensors")
    return str(directory)


@pytest.mark.parametrize("rslora", [True, False])
def test_adapters_are_merged_on_the_fly(rslora: bool, tmp_path: Path) -> None:
    base = write(tmp_path / "base", tensors(0, torch.float32))
    generator = torch.Generator().manual_seed(9)
    a, b = torch.randn(4, 16, generator=generator), torch.randn(48, 4, generator=generator)
    name = "model.layers.0.mlp.up_proj"
    lora = adapter(
        tmp_path / "lora",
        {"base_model_name_or_path": base, "use_rslora": rslora},
        {
            f"base_model.model.{name}.lora_A.weight": a,
            f"base_model.model.{name}.lora_B.weight": b,
            "base_model.model.lm_head.weight": torch.ones(40, 16),
        },
    )
    weight = load_file(f"{base}/model.safetensors")[f"{name}.weight"]
    exact = weight + (8 / (2 if rslora else 4)) * b @ a
    for number, named in enumerate((lora, f"{base}+{lora}")):
        out = tmp_path / f"out{number}"
        pt.merge("linear", {named: 1.0}, out=out)
        torch.testing.assert_close(read(out)[f"{name}.weight"], exact)
        assert torch.equal(read(out)["lm_head.weight"], torch.ones(40, 16))


@pytest.mark.parametrize(
    ("config", "extra", "named"),
    [
        ({"peft_type": "IA3"}, {}, "IA3"),
        ({"use_dora": True}, {}, "use_dora"),
        ({}, {"base_model.model.nowhere.lora_A.weight": torch.ones(4, 16)}, "nowhere"),
        ({}, {"base_model.model.nowhere.weight": torch.ones(4, 16)}, "nowhere"),
        ({}, {"base_model.model.lm_head.lora_A.weight": torch.ones(4, 16)}, "other half"),
        ({"base_model_name_or_path": None}, {}, "names no base"),
    ],
    ids=["ia3", "dora", "module", "tensor", "half", "base"],
)
def test_adapters_that_are_refused(config: dict, extra: dict, named: str, tmp_path: Path) -> None:
    base = write(tmp_path / "base", tensors(0))
    given = adapter(tmp_path / "lora", {"base_model_name_or_path": base} | config, extra or {"x": torch.ones(1)})
    assert named in refuse(CheckpointError, tmp_path / "out", "linear", [given])


def test_pickles_and_float8(tmp_path: Path) -> None:
    (tmp_path / "pickled").mkdir()
    torch.save(tensors(0), tmp_path / "pickled" / "pytorch_model.bin")
    assert "save_pretrained" in refuse(CheckpointError, tmp_path / "out", "linear", [str(tmp_path / "pickled")])
    eight = write(tmp_path / "eight", {"w": torch.ones(4).to(torch.float8_e4m3fn)})
    assert "F8_E4M3" in refuse(CheckpointError, tmp_path / "out", "linear", [eight])


def test_a_sweep_is_its_single_merges(tmp_path: Path) -> None:
    base, a, b = family(tmp_path, 2)
    cases: list[tuple[str, Any, str | None, dict[str, list[float]]]] = [
        ("linear", [a, b], None, {"weight": [0.1, 0.5]}),
        ("ties", {a: 0.5, b: 0.5}, base, {"density": [0.2, 0.7], "lambda": [0.5, 1.0]}),
        ("dare_linear", {a: 1.0}, base, {"weight": [0.3, 0.6]}),
        ("slerp", [a, b], None, {"weight": [0.25, 0.75]}),
    ]
    for method, models, over, sweep in cases:
        report = pt.merge(method, models, over, tmp_path / method, sweep=sweep)
        assert [path.parent for path in report.results] == [tmp_path / method] * len(report.results)
    single = tmp_path / "single"
    pt.merge("linear", {a: 0.9, b: 0.1}, out=single / "1")
    pt.merge("ties", {a: 0.5, b: 0.5}, base, single / "2", density=0.7, scale=0.5)
    pt.merge("dare_linear", {a: 0.6}, base, single / "3")
    pt.merge("slerp", [a, b], out=single / "4", t=0.75)
    for number, path in enumerate(
        ("linear/weight=0.1", "ties/density=0.7,lambda=0.5", "dare_linear/weight=0.6", "slerp/weight=0.75"), 1
    ):
        one, other = read(tmp_path / path), read(single / str(number))
        assert all(torch.equal(one[name], other[name]) for name in SHAPES)


def test_the_record_and_the_card(tmp_path: Path) -> None:
    base, a, b = family(tmp_path, 2)
    (tmp_path / "m0" / "tokenizer.json").write_text("{}")
    (tmp_path / "m0" / "generation_config.json").write_text("{}")
    pt.merge("ties", {a: 0.5, b: [0.1, 0.9]}, base, tmp_path / "out", seed=5, shard_bytes=3000)
    record = json.loads((tmp_path / "out" / "paretune.json").read_text())
    assert record["seed"] == 5
    assert [entry["model"] for entry in record["inputs"]] == [base, a, b]
    assert len({entry["fingerprint"] for entry in record["inputs"]}) == 3
    assert record["merge"]["models"][1]["parameters"] == {"weight": [0.1, 0.9]}
    assert "tokenizer.json" in content(tmp_path / "out")
    assert "generation_config.json" in content(tmp_path / "out")
    assert "2306.01708" in (tmp_path / "out" / "README.md").read_text()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert set(index["weight_map"]) == set(SHAPES)


def test_fingerprints_do_not_depend_on_layout(tmp_path: Path) -> None:
    from paretune.merging.inputs import Model

    one, two = write(tmp_path / "one", tensors(0)), write(tmp_path / "two", tensors(0), 3)
    other = write(tmp_path / "other", tensors(1))
    assert Model(one).fingerprint == Model(two).fingerprint != Model(other).fingerprint
