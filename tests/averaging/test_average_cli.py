"""`paretune average learn, apply, sweep`: files, bits, statements, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from averaging_models import save_ends, token_rows
from safetensors.torch import load_file, save_file

import paretune as pt
from paretune.cli.main import main


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``pre``, ``post`` (llama, float32), ``tied-pre``, ``tied-post`` (qwen2), ``best.jsonl``."""
    directory = tmp_path_factory.mktemp("ends")
    save_ends(directory, "llama")
    tied = directory / "tied"
    save_ends(tied, "qwen2")
    (directory / "best.jsonl").write_text("".join(json.dumps(row) + "\n" for row in token_rows(12)))
    return directory


def average(ends: Path, *arguments: object) -> int:
    given = ["average", arguments[0], "--pre", ends / "pre", "--post", ends / "post", *arguments[1:]]
    return main([str(each) for each in given])


def tensors(directory: Path) -> dict[str, Any]:
    return load_file(directory / "model.safetensors")


def test_learn_writes_ratios_history_and_picture(
    ends: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ratios.json"
    data = ends / "best.jsonl"
    assert average(ends, "learn", "--data", data, "--blocks", 2, "--mean", 0.3, "--steps", 3, "-o", out, "--json") == 0
    content = json.loads(out.read_text())
    assert content == json.loads(capsys.readouterr().out)
    assert content["mean"] == 0.3
    assert [block["layers"] for block in content["blocks"]] == [[0, 1], [2, 3]]
    assert sum(block["ratio"] for block in content["blocks"]) / 2 == pytest.approx(0.3, abs=1e-6)
    assert [record["step"] for record in content["history"]] == [0, 1, 2]
    assert content["tensors"].keys() == tensors(ends / "pre").keys()
    assert (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")


def test_apply_learned_ratios(ends: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "ratios.json"
    assert average(ends, "learn", "--data", ends / "best.jsonl", "--steps", 2, "--lr", 1, "-o", file, "--quiet") == 0
    assert average(ends, "apply", "--ratios", file, "-o", tmp_path / "out", "--quiet") == 0
    assert "mean 0.2000" in capsys.readouterr().out
    ratios = pt.Ratios.load(file)
    assert len(set(ratios.tensors.values())) > 2
    pre, post, got = (tensors(path) for path in (ends / "pre", ends / "post", tmp_path / "out"))
    for name, alpha in ratios.tensors.items():
        wanted = alpha * pre[name].double() + (1 - alpha) * post[name].double()
        torch.testing.assert_close(got[name].double(), wanted, rtol=1e-6, atol=1e-7)
    assert pt.Ratios.load(tmp_path / "out" / "ratios.json") == ratios

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(ends / "post", dtype=torch.float32)
    pt.LiveMerge(model, pre=ends / "pre", post=ends / "post").set(ratios.tensors)  # without writing
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), got[name], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_and_one_are_the_end_points_to_the_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    """Signed zeros and numbers below the normal range included."""
    generator = torch.Generator().manual_seed(0)
    models = {}
    for name in ("pre", "post"):
        values = torch.randn(4000, generator=generator).to(dtype)
        values[torch.randperm(4000, generator=generator)[:400]] = -0.0
        values[torch.randperm(4000, generator=generator)[:100]] = 1e-39
        models[name] = {"layers.0.mlp.weight": values.view(40, 100), "lm_head.weight": values.flip(0).view(100, 40)}
        (tmp_path / name).mkdir()
        save_file(models[name], tmp_path / name / "model.safetensors")
    for alpha, name in ((0, "post"), (1, "pre")):
        assert average(tmp_path, "apply", "--ratios", alpha, "-o", tmp_path / f"out{alpha}", "--quiet") == 0
        for key, value in tensors(tmp_path / f"out{alpha}").items():
            bits = torch.int32 if dtype == torch.float32 else torch.int16
            assert torch.equal(value.view(bits), models[name][key].view(bits))


def test_by_hand_with_pivots_and_parts(
    ends: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ["--ratios", "0.4,0.1", "--pivots", "0", "--head", "last", "--norms", "1", "--embeddings", "0.9"]
    assert average(ends, "apply", *arguments, "-o", tmp_path / "x", "--dry-run", "--json") == 0
    stated = json.loads(capsys.readouterr().out)["tensors"]
    assert not (tmp_path / "x").exists()
    assert "extrapolated" not in caplog.text
    assert stated["lm_head.weight"] == stated["model.layers.1.mlp.up_proj.weight"] == 0.1
    assert stated["model.layers.0.mlp.up_proj.weight"] == 0.4
    assert stated["model.norm.weight"] == stated["model.layers.0.input_layernorm.weight"] == 1
    assert stated["model.embed_tokens.weight"] == 0.9
    assert average(ends, "apply", "--ratios", "1.2", "-o", tmp_path / "x", "--dry-run") == 0
    assert "extrapolated" in caplog.text


def test_tied_head_stored_twice_has_one_ratio(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Checkpoints of other tools store a tied head as a tensor of its own."""
    from transformers import AutoModelForCausalLM

    save_ends(tmp_path, "qwen2")
    for name in ("pre", "post"):
        file = tmp_path / name / "model.safetensors"
        content = load_file(file)
        content["lm_head.weight"] = content["model.embed_tokens.weight"].clone()
        save_file(content, file, {"format": "pt"})
    arguments = ["--ratios", "0.4,0.1", "--embeddings", "0.7", "-o", tmp_path / "out", "--json", "--quiet"]
    assert average(tmp_path, "apply", *arguments) == 0
    stated = json.loads(capsys.readouterr().out)["ratios"]
    assert stated["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}
    assert stated["tensors"]["lm_head.weight"] == stated["tensors"]["model.embed_tokens.weight"] == 0.7
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ends = [load_file(tmp_path / name / "model.safetensors")["model.embed_tokens.weight"] for name in ("pre", "post")]
    torch.testing.assert_close(model.lm_head.weight.detach(), 0.7 * ends[0] + 0.3 * ends[1])


def test_sweep_writes_both_curves_and_goes_on(ends: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", ends / "best.jsonl", "--means", "0:1:0.5", "--steps", 2, "-o", tmp_path / "sweep", "--quiet"]
    assert average(ends, "sweep", *arguments, "--json") == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert [point["name"] for point in points] == ["uniform-0", "uniform-0.5", "adaptive-0.5", "uniform-1"]
    assert all(point["family"] == "adaptive" and point["nll"] > 0 for point in points)
    for end, name in (("post", "uniform-0"), ("pre", "uniform-1")):
        wanted = tensors(ends / end)
        assert all(torch.equal(value, wanted[key]) for key, value in tensors(tmp_path / "sweep/models" / name).items())
    learned = (tmp_path / "sweep/ratios/adaptive-0.5.json").stat().st_mtime_ns
    assert average(ends, "sweep", *arguments) == 0
    assert (tmp_path / "sweep/ratios/adaptive-0.5.json").stat().st_mtime_ns == learned
    assert average(ends, "sweep", *arguments, "--seed", 5) == 2
    assert "other arguments" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["learn", "--data", "absent.jsonl", "-o", "x.json"], "absent.jsonl"),
        (["learn", "--data", "{}", "-o", "x.txt"], ".json"),
        (["learn", "--data", "{}", "--blocks", "9", "-o", "x.json"], "4 layers"),
        (["learn", "--data", "{}", "--mean", "2", "-o", "x.json"], "mean"),
        (["learn", "--data", "{}", "--block", "3", "-o", "x.json"], "--blocks"),
        (["apply", "--ratios", "absent.json", "-o", "x"], "absent.json"),
        (["apply", "--ratios", "0.1,0.2", "--pivots", "1,2", "-o", "x"], "3 blocks"),
        (["apply", "--ratios", "0.1", "--head", "first", "-o", "x"], "head"),
        (["sweep", "--data", "{}", "--means", "0:2:1", "-o", "x"], "means"),
    ],
)
def test_one_line_errors(
    arguments: list[str], said: str, ends: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert average(ends, *[str(ends / "best.jsonl") if each == "{}" else each for each in arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_mixture_of_experts_live_and_written_are_the_same(tmp_path: Path) -> None:
    """transformers fuses the experts that checkpoints store one by one."""
    from transformers import AutoModelForCausalLM

    save_ends(tmp_path, "mixtral")
    assert average(tmp_path, "apply", "--ratios", "0.4,0.1,0.7", "-o", tmp_path / "out", "--quiet") == 0
    ratios = pt.Ratios.load(tmp_path / "out" / "ratios.json")
    assert ratios.tensors["model.layers.3.block_sparse_moe.experts.2.w1.weight"] == 0.7
    wanted = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "post")
    live = pt.LiveMerge(model, pre=tmp_path / "pre", post=tmp_path / "post").set(ratios.tensors)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, wanted[name], rtol=0, atol=0)
    live.set([0.4, 0.1, 0.7])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, wanted[name], rtol=0, atol=1e-6)
