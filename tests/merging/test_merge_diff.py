"""The delta report, against torch; and both commands."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from merge_models import CONFIG, SHAPES, content, family, read, tensors, write

from paretune.cli.main import main
from paretune.errors import MismatchError
from paretune.merging.difference import compare


def test_against_torch(tmp_path: Path) -> None:
    shapes = SHAPES | {"model.layers.1.mlp.experts.3.w": (400, 300)}
    base, reference, aligned = family(tmp_path, 2, torch.bfloat16, shapes)
    found = compare(base, reference, aligned).to_dict()
    w, r, a = ({n: t.double() for n, t in tensors(i, torch.bfloat16, shapes).items()} for i in range(3))

    def whole(names: list[str]) -> dict[str, float]:
        x = torch.cat([(r[n] - w[n]).flatten() for n in names])
        y = torch.cat([(a[n] - r[n]).flatten() for n in names])
        size = torch.cat([w[n].flatten() for n in names]).norm()
        both = (x != 0) & (y != 0)
        return {
            "elements": x.numel(),
            "relative_norm": float(x.norm() / size),
            "zero_share": float((x == 0).double().mean()),
            "effective_density": float(x.abs().sum() ** 2 / (x.numel() * x.norm() ** 2)),
            "update_relative_norm": float(y.norm() / size),
            "update_zero_share": float((y == 0).double().mean()),
            "cosine": float(torch.nn.functional.cosine_similarity(x, y, 0)),
            "sign_conflict": float(((x.sign() != y.sign()) & both).sum() / both.sum()),
        }

    def same(one: dict[str, float], two: dict[str, float]) -> None:
        assert one.keys() == two.keys()
        assert all(math.isclose(one[key], two[key], rel_tol=1e-5, abs_tol=1e-9) for key in one)

    same(found["whole"], whole(list(shapes)))
    same(found["blocks"]["layer 1"], whole([n for n in shapes if ".layers.1." in n]))
    same(found["modules"]["mlp.up_proj"], whole([n for n in shapes if "up_proj" in n]))
    same(found["tensors"]["lm_head.weight"], whole(["lm_head.weight"]))
    assert "mlp.experts.*.w" in found["modules"]


def test_equal_models_and_strangers(tmp_path: Path) -> None:
    (base,) = family(tmp_path, 0)
    assert compare(base, base).whole.to_dict() == {
        "elements": sum(math.prod(s) for s in SHAPES.values()),
        "relative_norm": 0.0,
        "zero_share": 1.0,
        "effective_density": None,
    }
    other = write(tmp_path / "other", {"model.layers.0.x": torch.ones(2)}, config=CONFIG)
    with pytest.raises(MismatchError):
        compare(base, other)


def test_diff_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, reference, aligned = family(tmp_path, 2)
    picture = tmp_path / "d.svg"
    assert main(["diff", base, reference, aligned, "--plot", str(picture)]) == 0
    table = capsys.readouterr().out
    assert "sign_conflict" in table
    assert table.splitlines()[-1].startswith("whole")
    assert picture.read_text().count("<svg") == 1
    assert main(["diff", base, reference, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["whole"]["elements"] > 0
    assert main(["diff", base, reference, "--plot", "d.exe"]) == 2
    assert main(["diff", base, str(tmp_path / "absent")]) == 2


def test_merge_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, a, b = family(tmp_path, 2)
    out = tmp_path / "out"
    command = ["merge", "ties", "--model", f"{a}=0.6", "--model", f"{b}=0.4", "--base", base, "-o", str(out)]
    assert main([*command, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    for word in ("tensors", "to read", "to write", "memory", "time", "mismatch"):
        assert word in plan
    assert main([*command, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mismatches"] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m0", "m1", "m2"]
    assert main([*command, "--json", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["results"] == [str(out)]
    assert captured.err == ""
    assert main(command) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_merge_command_with_a_recipe_and_sweeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = family(tmp_path, 1)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(json.dumps({"merge_method": "linear", "models": [{"model": a}, {"model": b}]}))
    assert main(["merge", str(recipe), str(tmp_path / "one")]) == 0
    pair = ["merge", "linear", "--model", a, "--model", b]
    assert main([*pair, "-o", str(tmp_path / "two")]) == 0
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in SHAPES)
    assert main([*pair, "-o", str(tmp_path / "sweep"), "--sweep", "weight=0.1:0.9:0.1"]) == 0
    assert len(list((tmp_path / "sweep").iterdir())) == 9
    assert (tmp_path / "sweep" / "weight=0.3" / "model.safetensors").exists()
    options = ["--pivots", "0", "--ratios", "0.2,0.4", "--head", "1", "--shard-size", "1kB", "--dtype", "float16"]
    assert main([*pair, "-o", str(tmp_path / "parts"), *options]) == 0
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 3
    capsys.readouterr()
    for wrong in (
        ["merge", "linear", "-o", "x"],
        [*pair],
        [*pair, "-o", "x", "--sweep", "weight"],
        [*pair, "-o", "x", "--sweep", "weight=1:0:0.1"],
        [*pair, "-o", "x", "--shard-size", "5 apples"],
        [*pair, "-o", "x", "--dens", "0.5"],
        ["merge", "linear", "--model", f"{a}=", "-o", "x"],
        ["merge", str(recipe), "x", "--density", "0.5"],
    ):
        assert main(wrong) == 2, wrong
        assert capsys.readouterr().err.count("\n") == 1


def test_a_mismatch_is_shown_in_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (a,) = family(tmp_path, 0)
    b = write(tmp_path / "b", {name: value for name, value in tensors(1).items() if "norm" not in name})
    assert main(["merge", "linear", "--model", a, "--model", b, "-o", str(tmp_path / "out"), "--dry-run"]) == 2
    captured = capsys.readouterr()
    assert "lacks tensors" in captured.out
    assert "lacks tensors" in captured.err


def test_merging_does_not_import_torch(tmp_path: Path) -> None:
    """It would take longer than merging a small model does; and the bytes are the same without it."""
    base, a, b = family(tmp_path, 2)
    here = str(Path(__file__).parents[2] / "src")
    code = f"""
import sys
from paretune.cli.main import main
for method in ("ties", "dare_linear"):
    arguments = ["merge", method, "--model", {a!r}, "--model", {b!r}, "--base", {base!r}, "--quiet"]
    assert main([*arguments, "-o", {str(tmp_path / "without")!r} + method]) == 0
assert main(["diff", {a!r}, {b!r}]) == 0
print("torch" in sys.modules)
"""
    environment = os.environ | {"PYTHONPATH": here}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[-1] == "False"
    for method in ("ties", "dare_linear"):
        arguments = ["merge", method, "--model", a, "--model", b, "--base", base, "--quiet"]
        assert main([*arguments, "-o", str(tmp_path / f"with{method}")]) == 0
        assert content(tmp_path / f"with{method}") == content(tmp_path / f"without{method}")
