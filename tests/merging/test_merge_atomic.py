"""Whenever a merge is killed, its output is absent, resumable or complete."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from merge_models import SHAPES, content, family, read, tensors, write

import paretune as pt
from paretune.errors import CheckpointError
from paretune.merging import output, stream

SCRIPT = """
import sys
from paretune.merging import output, merge
output._COMMIT_BYTES = 1 << 18  # commit often: kills then hit every stage
base, a, b, out = sys.argv[1:]
merge("ties", {a: 0.6, b: 0.4}, base, out, workers=2, shard_bytes=1_000_000)
"""
MANY = SHAPES | {f"model.layers.{i}.mlp.down.weight": (160, 1000) for i in range(2, 14)}


def start(paths: list[str], out: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(Path(pt.__file__).parent.parent), "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", SCRIPT, *paths, str(out)], env=environment, stderr=subprocess.PIPE)


def loads(directory: Path) -> bool:
    """Whether a user's from_pretrained would find weights and a configuration."""
    weights = list(directory.glob("*.safetensors")) or list(directory.glob("*.index.json"))
    return (directory / "config.json").exists() and bool(weights)


def kill_and_resume(times: int, root: Path, seed: int) -> None:
    paths = family(root, 2, shapes=MANY)
    reference = root / "reference"
    began = time.monotonic()
    assert start(paths, reference).wait() == 0
    whole = time.monotonic() - began
    wanted = content(reference)
    rng = random.Random(seed)
    for attempt in range(times):
        out = root / f"out{attempt}"
        process = start(paths, out)
        time.sleep(rng.uniform(0.3, 1.0) * whole)
        process.send_signal(signal.SIGKILL)
        process.wait()
        stage = out.with_name(out.name + ".merging")
        if out.exists():
            assert content(out) == wanted  # complete
        elif stage.exists() and loads(stage):
            assert {n: b for n, b in content(stage).items() if n.endswith(".safetensors")} == {
                n: b for n, b in wanted.items() if n.endswith(".safetensors")
            }
        if not out.exists():
            again = start(paths, out)
            assert again.wait() == 0, again.stderr.read().decode() if again.stderr else ""
            assert content(out) == wanted
        assert not stage.exists()
        shutil.rmtree(out)


def test_killed_at_random_moments(tmp_path: Path) -> None:
    kill_and_resume(5, tmp_path, 0)


@pytest.mark.slow
def test_killed_at_fifty_random_moments(tmp_path: Path) -> None:
    kill_and_resume(50, tmp_path, 1)


class Stop(BaseException):
    """Stands for the end of the process: nothing catches it."""


def interrupted(root: Path, paths: list[str], after: int, monkeypatch: pytest.MonkeyPatch, workers: int = 1) -> Path:
    """A merge that stops after so many finished tensors, each of them committed."""
    out = root / "out"
    finished = output.Output.finished

    def count(self: output.Output, number: int, size: int) -> None:
        if len(self.done) >= after:
            raise Stop
        finished(self, number, size)

    with monkeypatch.context() as patch:
        patch.setattr(output, "_COMMIT_BYTES", 1)
        patch.setattr(output.Output, "finished", count)
        with pytest.raises(Stop):
            pt.merge("ties", {paths[1]: 0.6, paths[2]: 0.4}, paths[0], out, workers=workers)
    assert not out.exists()
    return out


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_done_is_not_done_again(workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = family(tmp_path, 2)
    out = interrupted(tmp_path, paths, 3, monkeypatch, workers)
    report = pt.merge("ties", {paths[1]: 0.6, paths[2]: 0.4}, paths[0], out)
    assert report.resumed >= 3
    pt.merge("ties", {paths[1]: 0.6, paths[2]: 0.4}, paths[0], tmp_path / "fresh")
    assert content(out) == content(tmp_path / "fresh")


def test_another_merge_does_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = family(tmp_path, 2)
    out = interrupted(tmp_path, paths, 2, monkeypatch)
    with pytest.raises(CheckpointError, match="another merge"):
        pt.merge("ties", {paths[1]: 0.5, paths[2]: 0.5}, paths[0], out)
    os.utime(Path(paths[1]) / "model.safetensors", ns=(1, 1))  # an input was written anew
    with pytest.raises(CheckpointError, match="an input has changed"):
        pt.merge("ties", {paths[1]: 0.6, paths[2]: 0.4}, paths[0], out)


@pytest.mark.parametrize("damage", ["torn", "garbage", "shard gone", "shard cut"])
def test_a_damaged_partial_result(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever cannot be trusted is written again."""
    paths = family(tmp_path, 2)
    out = interrupted(tmp_path, paths, 4, monkeypatch)
    stage = tmp_path / "out.merging"
    journal = stage / "journal.jsonl"
    if damage == "torn":
        journal.write_bytes(journal.read_bytes()[:-2])
    elif damage == "garbage":
        journal.write_bytes(journal.read_bytes() + b'{"x": \n[99999, -3]\n')
    elif damage == "shard gone":
        (stage / "model.safetensors.partial").unlink()
    else:
        os.truncate(stage / "model.safetensors.partial", 1000)
    pt.merge("ties", {paths[1]: 0.6, paths[2]: 0.4}, paths[0], out)
    pt.merge("ties", {paths[1]: 0.6, paths[2]: 0.4}, paths[0], tmp_path / "fresh")
    assert content(out) == content(tmp_path / "fresh")


@pytest.mark.parametrize("step", range(12))
def test_stopped_while_publishing(step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rename and every sync of the end, failed once."""
    base, a, b = paths = family(tmp_path, 2)
    calls = 0

    def failing(real):  # type: ignore[no-untyped-def]
        def call(*arguments, **options):  # type: ignore[no-untyped-def]
            nonlocal calls
            calls += 1
            if calls == step + 1:
                raise Stop
            return real(*arguments, **options)

        return call

    out = tmp_path / "out"
    stopped = False
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing(Path.rename))
        patch.setattr(output, "sync", failing(output.sync))
        patch.setattr(os, "rename", failing(os.rename))
        patch.setattr(output, "write_companions", failing(output.write_companions))
        try:
            pt.merge("ties", {a: 0.6, b: 0.4}, base, out, shard_bytes=2500)
        except Stop:
            stopped = True
    assert stopped or step > 5
    if not out.exists():
        pt.merge("ties", {a: 0.6, b: 0.4}, base, out, shard_bytes=2500)
    pt.merge("ties", {a: 0.6, b: 0.4}, paths[0], tmp_path / "fresh", shard_bytes=2500)
    assert content(out) == content(tmp_path / "fresh")


def test_two_at_once(tmp_path: Path) -> None:
    base, a, b = family(tmp_path, 2)
    plan = pt.merging.plan.make_plan([pt.merging.api.build("ties", [a, b], base, {})])
    first = output.Output(plan, tmp_path / "out")
    first.open()
    with pytest.raises(CheckpointError, match="another process"):
        pt.merge("ties", [a, b], base, tmp_path / "out")
    first.close()
    pt.merge("ties", [a, b], base, tmp_path / "out")


def test_a_strangers_directory_is_left_alone(tmp_path: Path) -> None:
    a, b = family(tmp_path, 1)
    (tmp_path / "out.merging").mkdir()
    (tmp_path / "out.merging" / "thesis.tex").write_text("do not lose me")
    with pytest.raises(CheckpointError, match="something else"):
        pt.merge("linear", [a, b], out=tmp_path / "out")
    assert (tmp_path / "out.merging" / "thesis.tex").read_text() == "do not lose me"


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = family(tmp_path, 1)
    real = os.pwrite

    def full(descriptor: int, data: bytes, offset: int) -> int:
        if offset > 2000:
            raise OSError(28, "No space left on device")
        return real(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(CheckpointError, match="No space left"):
            pt.merge("linear", [a, b], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    pt.merge("linear", [a, b], out=tmp_path / "out")
    assert read(tmp_path / "out").keys() == SHAPES.keys()


def test_an_interrupt_stops_all_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C: the exception arrives, and what is finished stays finished."""
    paths = family(tmp_path, 2)
    out = tmp_path / "out"

    def interrupt(read: int, total: int) -> None:
        if read > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pt.merge("linear", paths, out=out, workers=2, progress=interrupt)
    journal = (tmp_path / "out.merging" / "journal.jsonl").read_text().splitlines()
    assert json.loads(journal[1])
    assert pt.merge("linear", paths, out=out).resumed > 0


INTERRUPTED = """
import os, signal, sys
from paretune.cli import main, merge

pressed = []

def press_control_c(bar, read, total):
    if read > total // 2 and not pressed:
        pressed.append(True)
        os.kill(os.getpid(), signal.SIGINT)

merge._Bar.__call__ = press_control_c
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without
sys.exit(main.main(sys.argv[1:]))
"""


def test_control_c_leaves_things_resumable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A real signal to the command, two workers at work; then the same command."""
    from paretune.cli.main import main

    paths = family(tmp_path, 2, shapes=MANY)
    out = tmp_path / "out"
    command = ["merge", "linear", "--model", paths[0], "--model", paths[1], "--workers", "2", "-o"]
    environment = os.environ | {"PYTHONPATH": str(Path(pt.__file__).parent.parent), "OPENBLAS_NUM_THREADS": "1"}
    script = [sys.executable, "-c", INTERRUPTED, *command, str(out)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert "the same command goes on" in done.stderr
    assert not out.exists()
    assert (tmp_path / "out.merging").is_dir()
    assert main([*command, str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["resumed"] > 0
    assert main([*command, str(tmp_path / "whole")]) == 0
    assert content(out) == content(tmp_path / "whole")


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    paths = family(tmp_path, 2)
    seen: list[tuple[int, int]] = []
    report = pt.merge("linear", paths, out=tmp_path / "out", progress=lambda read, total: seen.append((read, total)))
    assert seen[-1] == (report.bytes_read, report.bytes_read)
    assert stream.default_workers() >= 1


def test_an_empty_model_of_scalars(tmp_path: Path) -> None:
    a = write(tmp_path / "a", {"w": torch.zeros(0, 3), "s": torch.tensor(2.0)})
    b = write(tmp_path / "b", {"w": torch.zeros(0, 3), "s": torch.tensor(4.0)})
    pt.merge("linear", [a, b], out=tmp_path / "out")
    assert read(tmp_path / "out")["s"] == 3
    assert tensors(0).keys() == SHAPES.keys()
