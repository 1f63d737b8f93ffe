"""Checkpoints that are missing, broken or hostile give one line of CheckpointError, never a crash."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_task_vector import values, write
from torch import Tensor

import paretune as pt
from paretune.errors import CheckpointError, PareTuneError


def raw(directory: Path, header: object, data: bytes = b"\0" * 64, length: int | None = None) -> Path:
    """A safetensors file with any header and data."""
    directory.mkdir(parents=True, exist_ok=True)
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = struct.pack("<Q", len(text) if length is None else length)
    (directory / "model.safetensors").write_bytes(size + text + data)
    return directory


def entry(dtype: object = "F32", shape: object = (4,), offsets: object = (0, 16)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refuse(path: Path | str) -> str:
    """Both sides of a vector refuse the checkpoint; the message."""
    with pytest.raises(CheckpointError) as caught:
        pt.TaskVector.between(base=path, reference=path)
    message = str(caught.value)
    assert "\n" not in message
    assert message
    return message


GOOD = {"a": entry(), "b": entry(offsets=(16, 32)), "c": entry(shape=(2, 4), offsets=(32, 64))}

BROKEN: dict[str, object] = {
    "not json": b"{nonsense",
    "not utf-8": b'{"\xff\xfe": 1}',
    "a list": [1, 2],
    "a number": 3,
    "null": None,
    "an entry that is no object": GOOD | {"a": 5},
    "no dtype": GOOD | {"a": {"shape": [4], "data_offsets": [0, 16]}},
    "no shape": GOOD | {"a": {"dtype": "F32", "data_offsets": [0, 16]}},
    "no offsets": GOOD | {"a": {"dtype": "F32", "shape": [4]}},
    "unknown dtype": GOOD | {"a": entry("F33")},
    "dtype that is no string": GOOD | {"a": entry(7)},
    "shape that is no list": GOOD | {"a": entry(shape="4")},
    "negative shape": GOOD | {"a": entry(shape=(-4,))},
    "fractional shape": GOOD | {"a": entry(shape=(4.0,))},
    "boolean shape": GOOD | {"a": entry(shape=(True,), offsets=(0, 4))},
    "absurd shape": GOOD | {"a": entry(shape=(2**62, 2**62))},
    "overflowing shape": GOOD | {"a": entry(shape=(2**32, 2**32))},
    "three offsets": GOOD | {"a": entry(offsets=(0, 16, 32))},
    "offsets that are no numbers": GOOD | {"a": entry(offsets=("0", "16"))},
    "negative offsets": GOOD | {"a": entry(offsets=(-16, 0))},
    "offsets turned round": GOOD | {"a": entry(offsets=(16, 0))},
    "offsets beyond the file": GOOD | {"c": entry(shape=(2, 40), offsets=(32, 352))},
    "huge offsets": GOOD | {"a": entry(offsets=(2**63, 2**63 + 16))},
    "offsets that do not fit the shape": GOOD | {"a": entry(shape=(3,))},
    "overlapping tensors": GOOD | {"b": entry(offsets=(8, 24))},
    "one tensor twice": GOOD | {"b": entry(offsets=(0, 16))},
    "metadata that is no object": GOOD | {"__metadata__": 7},
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_headers(what: str, tmp_path: Path) -> None:
    refuse(raw(tmp_path / "m", BROKEN[what]))


def test_the_good_one_is_read(tmp_path: Path) -> None:
    tau = pt.TaskVector.between(base=raw(tmp_path / "m", GOOD), reference=raw(tmp_path / "n", GOOD))
    assert set(tau.names) == {"a", "b", "c"}


@pytest.mark.parametrize("length", [0, 1, 7, 2**20, 2**40, 2**63, 2**64 - 1])
def test_header_lengths(length: int, tmp_path: Path) -> None:
    refuse(raw(tmp_path / "m", GOOD, length=length))


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 60, 200, -64, -1])
def test_truncated(size: int, tmp_path: Path) -> None:
    path = raw(tmp_path / "m", GOOD) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refuse(path.parent)


def test_trailing_bytes(tmp_path: Path) -> None:
    path = raw(tmp_path / "m", GOOD) / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"x" * 9)
    refuse(path.parent)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_an_error_or_a_vector(data: st.DataObject, tmp_path: Path) -> None:
    """Bytes of header and length changed at random: a clean refusal, or a vector whose tensors can be read."""
    path = raw(tmp_path / "m", GOOD) / "model.safetensors"
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 65))
        content[position] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, 3)) == 0
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))] if cut else content))
    names: tuple[str, ...] = ()
    message = ""
    try:
        tau = pt.TaskVector.between(base=path.parent, reference=path.parent)
        names = tau.names
    except PareTuneError as error:
        message = str(error)
    assert "\n" not in message
    for name in names:
        assert tau.dense(name).numel() == tau.numel(name)


def index(directory: Path, content: object) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (directory / "model.safetensors.index.json").write_text(text)
    return directory


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        {"weight_map": []},
        {"weight_map": {}},
        {"weight_map": {"a": 3}},
        {"weight_map": {"a": None}},
        {"weight_map": {"a": ""}},
        {"weight_map": {"a": "."}},
        {"weight_map": {"a": "missing.safetensors"}},
        {"weight_map": {"a": "nul\0l.safetensors"}},
        {"weight_map": {"a": "x" * 5000 + ".safetensors"}},
    ],
    ids=lambda c: str(c)[:40],
)
def test_broken_indexes(content: object, tmp_path: Path) -> None:
    refuse(index(tmp_path / "m", content))


@pytest.mark.parametrize(
    "form",
    [
        "../outside/model.safetensors",
        "absolute",
        "sub/../../outside/model.safetensors",
        "..\\outside\\model.safetensors",
    ],
)
def test_index_cannot_leave_its_directory(form: str, tmp_path: Path) -> None:
    outside = write(tmp_path / "outside", {"a": torch.ones(4)})
    (tmp_path / "m" / "sub").mkdir(parents=True)
    name = str(outside / "model.safetensors") if form == "absolute" else form
    message = refuse(index(tmp_path / "m", {"weight_map": {"a": name}}))
    assert "outside" in message


def test_index_that_names_a_tensor_its_shard_lacks(tmp_path: Path) -> None:
    directory = write(tmp_path / "m", values(0), 2)
    content = json.loads((directory / "model.safetensors.index.json").read_text())
    file = next(iter(content["weight_map"].values()))
    content["weight_map"]["ghost"] = file
    index(directory, content)
    assert "ghost" in refuse(directory)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    directory = write(tmp_path / "m", values(0), 3)
    (directory / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors" in refuse(directory)


def test_symbolic_links_out_of_the_directory(tmp_path: Path) -> None:
    secret = write(tmp_path / "outside", {"a": torch.ones(4)})
    linked = tmp_path / "m"
    linked.mkdir()
    (linked / "model.safetensors").symlink_to(secret / "model.safetensors")
    refuse(linked)


def test_the_hub_caches_links_are_followed(tmp_path: Path) -> None:
    """snapshots/REVISION/model.safetensors → ../../blobs/HASH is how every downloaded model looks."""
    for name, seed in (("models--org--base", 0), ("models--org--sft", 1)):
        snapshot, blobs = tmp_path / name / "snapshots" / "abc123", tmp_path / name / "blobs"
        snapshot.mkdir(parents=True)
        blobs.mkdir()
        save_file(values(seed), blobs / "d34db33f")
        (snapshot / "model.safetensors").symlink_to(Path("../../blobs/d34db33f"))
    sides = [tmp_path / n / "snapshots" / "abc123" for n in ("models--org--base", "models--org--sft")]
    tau = pt.TaskVector.between(base=sides[0], reference=sides[1])
    assert torch.equal(tau.dense("gain"), (values(1)["gain"] - values(0)["gain"]).reshape(1))


def test_links_within_the_directory_are_followed(tmp_path: Path) -> None:
    directory = write(tmp_path / "m", values(0))
    (directory / "model.safetensors").rename(directory / "weights.bin-but-safe")
    (directory / "model.safetensors").symlink_to("weights.bin-but-safe")
    assert pt.TaskVector.between(base=directory, reference=values(1)).names


@pytest.mark.parametrize(
    "file", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "consolidated.00.pth"]
)
def test_pickles_are_refused_with_the_mend(file: str, tmp_path: Path) -> None:
    directory = tmp_path / "m"
    directory.mkdir()
    torch.save(values(0), directory / file)
    assert "safetensors" in refuse(directory)
    assert "safetensors" in refuse(directory / file)


def test_an_adapter_is_not_a_model(tmp_path: Path) -> None:
    directory = tmp_path / "m"
    directory.mkdir()
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, directory / "adapter_model.safetensors")
    refuse(directory)


def test_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty" in refuse(tmp_path / "empty")
    assert "absent" in refuse(tmp_path / "absent")
    assert "absent" in refuse(str(tmp_path / "absent"))


def test_a_file_deleted_after_construction(tmp_path: Path) -> None:
    """What was mapped stays readable, or the loss is named; no crash."""
    directory = write(tmp_path / "m", {"a": torch.ones(1000)})
    tau = pt.TaskVector.between(base=directory, reference={"a": torch.full((1000,), 3.0)})
    (directory / "model.safetensors").unlink()
    try:
        survived = tau.dense("a").tolist() == [2.0] * 1000
    except CheckpointError as error:
        survived = "model.safetensors" in str(error)
    assert survived


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float32], ids=str)
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    def side(seed: int) -> dict[str, Tensor]:
        return {"a": torch.randn(33, generator=torch.Generator().manual_seed(seed)).to(dtype)}

    one, two = side(0), side(1)
    tau = pt.TaskVector.between(base=write(tmp_path / "a", one), reference=write(tmp_path / "b", two))
    assert torch.equal(tau.dense("a"), two["a"].float() - one["a"].float())


def test_sides_of_different_dtypes(tmp_path: Path) -> None:
    """bf16 base, fp32 reference: subtracted in fp32."""
    one, two = {"a": torch.randn(50).bfloat16()}, {"a": torch.randn(50)}
    tau = pt.TaskVector.between(base=write(tmp_path / "a", one), reference=write(tmp_path / "b", two))
    assert torch.equal(tau.dense("a"), two["a"] - one["a"].float())


def test_a_linked_directory_and_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory itself may be a link (runs/latest → runs/42): only what is in it must stay in it."""
    write(tmp_path / "real", values(0))
    (tmp_path / "latest").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    one = pt.TaskVector.between(base="latest", reference=values(1))
    two = pt.TaskVector.between(base=tmp_path / "real", reference=values(1))
    assert one.fingerprint == two.fingerprint
    inside = pt.TaskVector.between(base=tmp_path / "latest" / "model.safetensors", reference=values(1))
    assert inside.fingerprint == two.fingerprint


def test_many_concurrent_readers(tmp_path: Path) -> None:
    """Threads may read one vector at once (data loaders, sweeps)."""
    from concurrent.futures import ThreadPoolExecutor

    tau = pt.TaskVector.between(base=write(tmp_path / "a", values(0), 3), reference=write(tmp_path / "b", values(1)))
    want = values(1)["embed.weight"] - values(0)["embed.weight"]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: tau.dense("embed.weight"), range(64)))
    assert all(torch.equal(f, want.flatten()) for f in found)
