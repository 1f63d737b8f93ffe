"""τ = reference − base from paths, modules and dictionaries: one vector, one fingerprint, few bytes read."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import paretune as pt
from paretune.errors import ArgumentError, MismatchError, PareTuneError


def write(directory: Path, tensors: Mapping[str, Tensor], shards: int = 1, config: dict | None = None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    if shards == 1:
        save_file({k: tensors[k].contiguous().clone() for k in names}, directory / "model.safetensors")
    else:
        weight_map = {}
        for i in range(shards):
            file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            part = names[i::shards]
            save_file({k: tensors[k].contiguous().clone() for k in part}, directory / file)
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return directory


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(20, 8)
        self.block = nn.ModuleList([nn.Linear(8, 6), nn.Linear(6, 3)])
        self.gain = nn.Parameter(torch.randn(()))


def values(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {k: v.detach().clone().to(dtype) for k, v in Net(seed).state_dict().items()}


def forms(seed: int, tmp: Path, dtype: torch.dtype = torch.float32) -> dict[str, object]:
    tensors = values(seed, dtype)
    net = Net(seed).to(dtype)
    return {
        "path": write(tmp / f"single{seed}", tensors),
        "string": str(write(tmp / f"string{seed}", tensors)),
        "file": write(tmp / f"file{seed}", tensors) / "model.safetensors",
        "sharded": write(tmp / f"sharded{seed}", tensors, 3),
        "module": net,
        "dict": tensors,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["path", "string", "file", "sharded", "module", "dict"])
def test_every_form_gives_the_same_vector(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base, reference = forms(0, tmp_path, dtype), forms(1, tmp_path, dtype)
    tau = pt.TaskVector.between(base=base[form], reference=reference[form])
    want = {k: reference["dict"][k].float() - base["dict"][k].float() for k in values(0)}  # type: ignore[index]
    assert set(tau.names) == set(want)
    for name, expected in want.items():
        assert tuple(tau.shape(name)) == tuple(expected.shape)
        assert tau.numel(name) == expected.numel()
        flat = tau.dense(name)
        assert flat.dtype == torch.float32
        assert torch.equal(flat, expected.flatten())
        n = expected.numel()
        assert torch.equal(tau.dense(name, n // 3, n - n // 4), expected.flatten()[n // 3 : n - n // 4])
        index = torch.arange(n - 1, -1, -3)
        assert torch.equal(tau.gather(name, index), expected.flatten()[index])
        assert tau.gather(name, torch.empty(0, dtype=torch.int64)).numel() == 0


@pytest.mark.parametrize("form", ["string", "file", "sharded", "module", "dict", "mixed"])
def test_fingerprint_is_the_pairs_not_the_forms(form: str, tmp_path: Path) -> None:
    base, reference = forms(0, tmp_path), forms(1, tmp_path)
    want = pt.TaskVector.between(base=base["path"], reference=reference["path"]).fingerprint
    first, second = ("dict", "sharded") if form == "mixed" else (form, form)
    assert pt.TaskVector.between(base=base[first], reference=reference[second]).fingerprint == want
    assert isinstance(want, str)


def test_fingerprints_of_other_pairs_differ() -> None:
    one, two, three = values(0), values(1), values(2)
    nudged = {k: v.clone() for k, v in two.items()}
    nudged["block.1.bias"][0] += 1e-3
    renamed = {k.replace("gain", "loss"): v for k, v in two.items()}
    base_renamed = {k.replace("gain", "loss"): v for k, v in one.items()}
    prints = [
        pt.TaskVector.between(base=a, reference=b).fingerprint
        for a, b in ((one, two), (two, one), (one, three), (three, two), (one, nudged), (base_renamed, renamed))
    ]
    assert len(set(prints)) == len(prints)


def test_fingerprint_sees_a_change_anywhere_in_a_small_model() -> None:
    base, reference = values(0), values(1)
    seen = {pt.TaskVector.between(base=base, reference=reference).fingerprint}
    for name in reference:
        changed = {k: v.clone() for k, v in reference.items()}
        changed[name].view(-1)[-1] += 1
        seen.add(pt.TaskVector.between(base=base, reference=changed).fingerprint)
    assert len(seen) == 1 + len(reference)


def huge(directory: Path, elements: int, value: float) -> Path:
    """A checkpoint whose one tensor is a hole in the file, but for its last number."""
    directory.mkdir()
    header = json.dumps(
        {"w": {"dtype": "F32", "shape": [elements // 1024, 1024], "data_offsets": [0, 4 * elements]}}
    ).encode()
    header += b" " * (-len(header) % 8)
    with (directory / "model.safetensors").open("wb") as f:
        f.write(struct.pack("<Q", len(header)) + header)
        f.seek(4 * (elements - 1), 1)
        f.write(struct.pack("<f", value))
    return directory


def resident() -> int:
    """Anonymous memory of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    pytest.skip("no /proc")


def test_paths_are_not_read_at_construction(tmp_path: Path) -> None:
    """4 GiB a side: constructed in a moment, without memory, and entries are picked from the files."""
    n = 1 << 30
    base, reference = huge(tmp_path / "base", n, 1.0), huge(tmp_path / "reference", n, 3.0)
    memory, started = resident(), time.perf_counter()
    tau = pt.TaskVector.between(base=base, reference=reference)
    picked = tau.gather("w", torch.tensor([0, 12345, n - 1]))
    assert picked.tolist() == [0.0, 0.0, 2.0]
    assert tau.dense("w", n - 2, n).tolist() == [0.0, 2.0]
    assert time.perf_counter() - started < 3
    assert resident() - memory < 64 << 20
    assert tau.resident_bytes < 1 << 20


def test_training_in_place_does_not_change_tau() -> None:
    base, policy = Net(0), Net(1)
    tau = pt.TaskVector.between(base=base, reference=policy)
    before = {k: tau.dense(k).clone() for k in tau.names}
    with torch.no_grad():
        for p in (*policy.parameters(), *base.parameters()):
            p.add_(5.0)
    for name, want in before.items():
        assert torch.equal(tau.dense(name), want)
    assert pt.TaskVector.between(base=Net(0), reference=Net(1)).fingerprint == tau.fingerprint


def test_path_base_with_a_module_that_is_then_trained(tmp_path: Path) -> None:
    policy = Net(1)
    tau = pt.TaskVector.between(base=write(tmp_path / "b", values(0)), reference=policy)
    with torch.no_grad():
        policy.gain.add_(100)
    assert tau.dense("gain").abs().max() < 50


def test_in_memory_forms_cost_their_size(tmp_path: Path) -> None:
    big = {"w": torch.zeros(1000, 100)}
    assert pt.TaskVector.between(base=big, reference={"w": torch.ones(1000, 100)}).resident_bytes >= 400_000
    paths = [write(tmp_path / n, big) for n in "ab"]
    assert pt.TaskVector.between(base=paths[0], reference=paths[1]).resident_bytes < 10_000


def test_other_names_give_three_examples_and_the_count() -> None:
    base = values(0) | {f"extra.{i}": torch.zeros(3) for i in range(7)}
    for a, b in ((base, values(1)), (values(1), base)):
        with pytest.raises(MismatchError) as caught:
            pt.TaskVector.between(base=a, reference=b)
        message = str(caught.value)
        assert all(f"extra.{i}" in message for i in range(3))
        assert "extra.3" not in message
        assert "7" in message
        assert "\n" not in message


def test_other_shapes_give_three_examples_and_the_count() -> None:
    base = {f"l.{i}": torch.zeros(4, 5) for i in range(5)}
    with pytest.raises(MismatchError) as caught:
        pt.TaskVector.between(base=base, reference={k: torch.zeros(5, 4) for k in base})
    message = str(caught.value)
    assert all(f"l.{i}" in message for i in range(3))
    assert "5" in message
    assert "l.4" not in message
    assert "\n" not in message


def vocabulary(rows: int, fill: float = 1.0) -> dict[str, Tensor]:
    names = {"model.embed_tokens.weight": (rows, 4), "lm_head.weight": (rows, 4), "model.norm.weight": (4,)}
    return {k: torch.full(s, fill) for k, s in names.items()}


def test_other_vocabularies_are_refused_with_the_mend() -> None:
    with pytest.raises(MismatchError, match="base_vocab") as caught:
        pt.TaskVector.between(base=vocabulary(10), reference=vocabulary(12))
    assert "10" in str(caught.value)
    assert "12" in str(caught.value)
    with pytest.raises(MismatchError):
        pt.TaskVector.between(base=vocabulary(12), reference=vocabulary(10))
    with pytest.raises(MismatchError):
        pt.TaskVector.between(base=vocabulary(12), reference=vocabulary(10), base_vocab="pad")
    with pytest.raises(ArgumentError, match="base_vocab"):
        pt.TaskVector.between(base=vocabulary(10), reference=vocabulary(10), base_vocab="padded")


@pytest.mark.parametrize("as_paths", [False, True])
def test_added_rows_have_no_task_vector(as_paths: bool, tmp_path: Path) -> None:
    base, reference = vocabulary(10), vocabulary(12, 3.0)
    sides = [write(tmp_path / "b", base), write(tmp_path / "r", reference)] if as_paths else [base, reference]
    tau = pt.TaskVector.between(base=sides[0], reference=sides[1], base_vocab="pad")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert tuple(tau.shape(name)) == (12, 4)
        assert torch.equal(tau.dense(name), torch.cat([torch.full((40,), 2.0), torch.zeros(8)]))
        assert torch.equal(tau.dense(name, 38, 43), torch.tensor([2.0, 2.0, 0.0, 0.0, 0.0]))
        assert tau.gather(name, torch.tensor([47, 0, 40, 39])).tolist() == [0.0, 2.0, 0.0, 2.0]
    assert torch.equal(tau.dense("model.norm.weight"), torch.full((4,), 2.0))


def test_padding_is_for_one_vocabulary_only() -> None:
    base, reference = vocabulary(10), vocabulary(12)
    reference["model.norm.weight"] = torch.zeros(6)
    with pytest.raises(MismatchError, match="norm"):
        pt.TaskVector.between(base=base, reference=reference, base_vocab="pad")


@pytest.mark.parametrize("side", ["base", "reference"])
def test_a_tied_head_may_be_stored_on_one_side_only(side: str, tmp_path: Path) -> None:
    """Some savers write the tied head, some leave it out: not a mismatch."""
    sides = {"base": vocabulary(10), "reference": vocabulary(10, 3.0)}
    del sides[side]["lm_head.weight"]
    config = {"tie_word_embeddings": True}
    paths = {k: write(tmp_path / k, v, config=config) for k, v in sides.items()}
    tau = pt.TaskVector.between(**paths)
    assert torch.equal(tau.dense("model.embed_tokens.weight"), torch.full((40,), 2.0))


def test_an_untied_head_missing_on_one_side_is_refused(tmp_path: Path) -> None:
    base, reference = vocabulary(10), vocabulary(10, 3.0)
    base["lm_head.weight"] += 7
    del reference["lm_head.weight"]
    config = {"tie_word_embeddings": False}
    paths = [write(tmp_path / k, v, config=config) for k, v in (("b", base), ("r", reference))]
    with pytest.raises(MismatchError, match="lm_head"):
        pt.TaskVector.between(base=paths[0], reference=paths[1])


def test_wrapped_modules_are_their_modules() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    plain = pt.TaskVector.between(base=Net(0), reference=Net(1))
    wrapped = pt.TaskVector.between(base=Net(0), reference=Wrapper(Wrapper(Net(1))))
    assert set(wrapped.names) == set(plain.names)
    assert wrapped.fingerprint == plain.fingerprint


def test_unknown_names_and_ranges() -> None:
    tau = pt.TaskVector.between(base=values(0), reference=values(1))
    for call in (tau.dense, tau.shape, tau.numel):
        with pytest.raises((PareTuneError, KeyError), match="nothing"):
            call("nothing")


def test_empty_and_integer_tensors_do_not_disturb() -> None:
    base = {"w": torch.zeros(0, 4), "one": torch.ones(1), "position": torch.arange(5)}
    reference = {"w": torch.zeros(0, 4), "one": torch.ones(1) * 3, "position": torch.arange(5)}
    tau = pt.TaskVector.between(base=base, reference=reference)
    assert tau.dense("one").tolist() == [2.0]
    assert tau.dense("w").numel() == 0


@pytest.mark.parametrize("bad", [None, 3, ["a"], b"path"])
def test_what_is_no_model(bad: object) -> None:
    with pytest.raises((PareTuneError, TypeError)):
        pt.TaskVector.between(base=bad, reference=values(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("n", [1, 63, 64, 1000, (1 << 19) + 77])
def test_stored_tau_is_tau_rounded(dtype: torch.dtype, n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, generator=generator) * 1e-3
    x[n // 2 :] = 0
    tau = pt.TaskVector.between(base={"w": torch.zeros(n)}, reference={"w": x}).stored(dtype)
    got = tau.dense("w")
    if dtype == torch.bfloat16:
        assert torch.equal(got, x.bfloat16().float())
        assert tau.resident_bytes == 2 * n
    else:
        largest = torch.stack([part.abs().amax() for part in x.split(64)]).repeat_interleave(64)[:n]
        assert bool(((got - x).abs() <= largest / 254 * (1 + 1e-5)).all())
        assert tau.resident_bytes == n + 4 * len(x.split(64))
    index = torch.randint(0, n, (50,), generator=generator)
    assert torch.equal(tau.gather("w", index), got[index])
    assert torch.equal(tau.dense("w", n // 3, n), got[n // 3 :])


def test_stored_tau_takes_two_forms() -> None:
    tau = pt.TaskVector.between(base={"w": torch.zeros(3)}, reference={"w": torch.ones(3)})
    with pytest.raises(ArgumentError, match="dtype"):
        tau.stored(torch.float16)
