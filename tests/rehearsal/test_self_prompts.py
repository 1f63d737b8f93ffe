"""Prompts that a model makes itself: sources, guard, reproducible, resumable."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_model, make_tokenizer, write_rows

import paretune as pt
from paretune.generation.template import Template
from paretune.training.rehearsal_data import make_rehearsal

SEEDS = ["the cat sees a dog", "a bird likes the cat", "the red dog finds a bird"]


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model().eval()


def prompts(model: Any, source: Any, count: int = 12, **options: Any) -> pt.SelfPrompts:
    given = {"seeds": SEEDS, "max_tokens": 8, "progress": False, "steps": 2} | options
    return pt.self_prompts(model, make_tokenizer(), source, count, **given)


@pytest.mark.parametrize("source", ["user-mark", "prompt-model", "mutate", "raw-fragments"])
def test_every_source(source: str, model: Any) -> None:
    before = [p.detach().clone() for p in model.parameters()]
    # A random model seldom ends its turn.
    made = prompts(model, source, 4, max_tokens=40)
    assert 1 <= len(made.prompts) <= 4
    assert len(set(made.prompts)) == len(made.prompts)
    assert 0 < made.valid <= 1
    assert 0 < made.diversity <= 1
    assert not any(mark in prompt for prompt in made.prompts for mark in ("<user>", "<bot>"))
    assert prompts(model, source, 4, max_tokens=40, batch_size=5) == made  # not the batches', the seed's
    assert prompts(model, source, 4, max_tokens=40, seed=1).prompts != made.prompts
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_like_the_preferences_is_left_out(model: Any) -> None:
    made = prompts(model, "mutate", 40)
    guarded = prompts(model, "mutate", 40, preferences=SEEDS[:1])
    leaks = pt.Leakage(SEEDS[:1])
    assert any(leaks(prompt) for prompt in made.prompts)
    assert not any(leaks(prompt) for prompt in guarded.prompts)
    assert guarded.left_out > 0


def test_leakage_looks_at_shared_pairs_of_words() -> None:
    leaks = pt.Leakage(["tell me about mira .", "who ?"], share=0.5)
    assert leaks("tell me about oskar .")
    assert leaks("who ?")
    assert not leaks("tell oskar about me .")
    assert not leaks("")
    assert not pt.Leakage(["tell me about mira ."], share=1.0)("tell me about oskar .")
    with pytest.raises(pt.ArgumentError, match="share="):
        pt.Leakage([], share=0)


def test_a_source_that_fails_says_so(model: Any) -> None:
    with pytest.raises(pt.DataError, match="masked prompts"):
        prompts(model, "user-mark", 2, max_tokens=1)
    with pytest.raises(pt.DataError, match="like the preference prompts"):
        prompts(model, "mutate", 2, seeds=["cat"], preferences=["cat", *make_tokenizer().get_vocab()])
    with pytest.raises(pt.ArgumentError, match="seeds="):
        prompts(model, "mutate", seeds=())
    with pytest.raises(pt.ArgumentError, match="source="):
        prompts(model, "thin air")


def test_killed_and_resumed_is_the_same(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from paretune.generation import local

    options: dict[str, Any] = {
        "temperature": 1.0, "max_tokens": 6, "max_new_tokens": 40, "batch_size": 2, "progress": False,
    }  # fmt: skip
    make_rehearsal(model, make_tokenizer(), tmp_path / "whole.jsonl", "raw-fragments", 6, **options)
    real, calls = local._write, []

    def dies(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(local, "_write", dies)
    with pytest.raises(KeyboardInterrupt):
        make_rehearsal(model, make_tokenizer(), tmp_path / "killed.jsonl", "raw-fragments", 6, **options)
    assert not (tmp_path / "killed.jsonl").exists()
    before = len(calls)
    make_rehearsal(model, make_tokenizer(), tmp_path / "killed.jsonl", "raw-fragments", 6, **options)
    assert (tmp_path / "killed.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert len(calls) - before < before + 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.jsonl", "whole.jsonl"]


CHILD = """
import sys, time
sys.path[:0] = sys.argv[2:4]
from pathlib import Path
from test_self_prompts import KILLED, make_model, make_rehearsal, make_tokenizer
model = make_model().eval()
forward = type(model).forward
def slow(*given, **named):
    time.sleep(0.01)
    return forward(*given, **named)
type(model).forward = slow  # of the tuned copy as well
make_rehearsal(model, make_tokenizer(), Path(sys.argv[1]), **KILLED)
"""
KILLED: dict[str, Any] = {
    "source": "prompt-model", "count": 24, "seeds": SEEDS, "temperature": 1.0, "max_tokens": 8, "max_new_tokens": 40,
    "batch_size": 4, "progress": False,
}  # fmt: skip


@pytest.mark.slow
def test_killed_anywhere_and_resumed_is_the_same(model: Any, tmp_path: Path) -> None:
    """Among the prompts, then among the answers; never before a line more than last time."""
    here, out = Path(__file__).parent, tmp_path / "killed.jsonl"
    work = tmp_path / ".killed.jsonl.work"
    for name, more in (("prompts", 5), ("answers", 3), ("answers", 4)):
        command = [sys.executable, "-c", CHILD, str(out), str(here), str(here.parent)]
        child = subprocess.Popen(command)
        wanted = lines(work, name) + more
        while lines(work, name) < wanted:
            assert child.poll() is None, "it finished before it was killed"
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert not out.exists()
    make_rehearsal(model, make_tokenizer(), out, **KILLED)
    make_rehearsal(model, make_tokenizer(), tmp_path / "whole.jsonl", **KILLED)
    assert out.read_text() == (tmp_path / "whole.jsonl").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.jsonl", "whole.jsonl"]


def lines(work: Path, name: str) -> int:
    return sum(file.read_bytes().count(b"\n") for file in work.glob(f"{name}*"))


def test_prompts_alike_can_be_sampled_instead(model: Any, tmp_path: Path) -> None:
    report = make_rehearsal(
        model, make_tokenizer(), tmp_path / "a.jsonl", "mutate", 20, seeds=SEEDS, preferences=SEEDS[:1], alike="sample",
        temperature=1.0, max_tokens=8, max_new_tokens=40, progress=False,
    )  # fmt: skip
    assert report.sampled_answers > 0
    assert report.left_out == 0
    with pytest.raises(pt.ArgumentError, match="alike="):
        make_rehearsal(model, make_tokenizer(), tmp_path / "b.jsonl", alike="ignore")  # type: ignore[arg-type]


def test_template_is_read_off_the_tokenizer() -> None:
    tokenizer = make_tokenizer()
    found = Template.of(tokenizer)
    assert tokenizer.convert_ids_to_tokens(list(found.before)) == ["<user>"]
    assert tokenizer.convert_ids_to_tokens(list(found.after)) == ["<bot>"]


def test_own_samples_have_text_and_turns(model: Any) -> None:
    made = pt.own_samples(model, make_tokenizer(), 10, max_tokens=40, progress=False)
    user = make_tokenizer().convert_tokens_to_ids("<user>")
    turns = [row for row in made if row["input_ids"][0] == user]
    assert turns
    assert len(turns) < len(made)
    assert all(row["completion_mask"][0] == 0 and all(row["completion_mask"][1:]) for row in made)
    assert made == pt.own_samples(model, make_tokenizer(), 10, max_tokens=40, progress=False, batch_size=3)
    with pytest.raises(pt.ArgumentError, match="count="):
        pt.own_samples(model, make_tokenizer(), 1)
    with pytest.raises(
        pt.ArgumentError, match=r"max_tokens=60: a turn of \d+ tokens and its answer exceed the model's 64"
    ):
        pt.own_samples(model, make_tokenizer(), 10, max_tokens=60, progress=False)


def test_train_joint_rehearse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from paretune.cli.main import main

    make_model().save_pretrained(tmp_path / "sft")
    make_tokenizer().save_pretrained(tmp_path / "sft")
    pairs = write_rows(tmp_path / "pairs.jsonl", "dpo", 8)
    (tmp_path / "seeds.jsonl").write_text("".join(json.dumps({"prompt": seed}) + "\n" for seed in SEEDS))
    command = [
        "train", "joint", "--model_name_or_path", str(tmp_path / "sft"), "--preference_dataset", pairs,
        "--rehearse", "mutate", "--rehearse_seeds", str(tmp_path / "seeds.jsonl"), "--rehearse_count", "20",
        "--rehearse_max_new_tokens", "48", "--rehearse_nll", "0.3", "--max_steps", "8", "--save_strategy", "no",
        "--per_device_train_batch_size", "2", "--disable_tqdm", "true", "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip
    assert main(command) == 0, capsys.readouterr().err
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert (tmp_path / "out" / "rehearsal.jsonl").exists()
    assert {step["objective"] for step in record["steps"]} <= {"sft", "dpo", "chosen"}
    assert main([*command[:-1], str(tmp_path / "two"), "--sft_dataset", pairs]) == 2
    assert "drop one of them" in capsys.readouterr().err
