"""The file of answers: killed at any time, resumed without losing or repeating one; never another model's."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_model, make_tokenizer

import paretune as pt
from paretune.generation import read_generations
from paretune.generation.store import Store

PROMPTS = [f"the {a} {b}" for a in ("cat", "dog", "bird") for b in ("sees", "likes", "finds", "and")]
DECODING = pt.Decoding(6, temperature=1.0, samples=2, batch_size=2)

CHILD = """
import sys, time
sys.path.insert(0, sys.argv[2])
import paretune as pt
from test_generate_resume import DECODING, PROMPTS
from tiny_models import make_model, make_tokenizer
model = make_model()
forward = model.forward
def slow(*arguments, **named):
    time.sleep(0.02)
    return forward(*arguments, **named)
model.forward = slow
pt.generate(model, PROMPTS, DECODING, make_tokenizer(), sys.argv[1])
"""


@pytest.fixture(scope="module")
def made() -> tuple[Any, Any]:
    return make_model().eval(), make_tokenizer()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_killed_and_resumed(tmp_path: Path, made: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    out, here = tmp_path / "G.jsonl", Path(__file__).parent
    code = f"import sys; sys.path.insert(0, {str(here)!r})\n{CHILD}"
    child = subprocess.Popen([sys.executable, "-c", code, str(out), str(here.parent)])
    while not out.exists() or out.read_bytes().count(b"\n") < 5:
        assert child.poll() is None
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    kept = out.read_bytes()[: out.read_bytes().rindex(b"\n") + 1].decode().splitlines()
    assert 5 <= len(kept) < 24
    with open(out, "ab") as file:
        file.write(b'{"key": "00')  # torn by the kill

    from paretune.generation import local

    written, write = [], local._write
    monkeypatch.setattr(local, "_write", lambda m, t, ids, *rest: written.extend(ids) or write(m, t, ids, *rest))
    resumed = pt.generate(made[0], PROMPTS, DECODING, made[1], out)
    assert len(written) == 24 - len(kept)
    assert set(kept) <= set(out.read_text().splitlines())
    assert resumed == pt.generate(made[0], PROMPTS, DECODING, made[1])
    assert [(row["index"], row["sample"]) for row in lines(out)] == [(i, s) for i in range(12) for s in range(2)]
    written.clear()
    assert pt.generate(made[0], PROMPTS, DECODING, made[1], out) == resumed
    assert not written


def test_rows_have_the_names_of_alpaca_eval(tmp_path: Path, made: tuple[Any, Any]) -> None:
    out = tmp_path / "new" / "G.jsonl"
    prompt = [{"role": "user", "content": "the cat"}]
    answers = pt.generate(made[0], [prompt], pt.Decoding(4), made[1], out, name="mine")
    (row,) = lines(out)
    assert (row["instruction"], row["output"], row["generator"]) == ("the cat", answers[0].text, "mine")
    assert row["decoding"] == {"max_new_tokens": 4, "temperature": 0.0, "stop": []}
    assert read_generations(out) == answers
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps([{"instruction": "a", "output": "b", "generator": "c"}]))
    assert read_generations(listed)[0].text == "b"


@pytest.mark.parametrize(
    ("prompts", "decoding", "seed", "says"),
    [
        (PROMPTS[:2], DECODING, 1, "answers of another model"),
        (PROMPTS[:2], pt.Decoding(6, temperature=1.0, seed=1), 0, "other decoding settings"),
        (PROMPTS[:1], DECODING, 0, "not asked for now"),
        (PROMPTS[:2], pt.Decoding(6, temperature=1.0, samples=1), 0, "not asked for now"),
    ],
)
def test_a_file_of_something_else_is_refused(
    tmp_path: Path, made: tuple[Any, Any], prompts: list[str], decoding: pt.Decoding, seed: int, says: str
) -> None:
    out = tmp_path / "G.jsonl"
    pt.generate(made[0], PROMPTS[:2], DECODING, made[1], out)
    before = out.read_bytes()
    with pytest.raises(pt.ArgumentError, match=says):
        pt.generate(make_model(seed), prompts, decoding, made[1], out)
    assert out.read_bytes() == before


def test_more_prompts_and_samples_extend_a_file(tmp_path: Path, made: tuple[Any, Any]) -> None:
    out = tmp_path / "G.jsonl"
    pt.generate(made[0], PROMPTS[1:3], pt.Decoding(6, temperature=1.0), made[1], out)
    kept = {row["key"] for row in lines(out)}
    pt.generate(made[0], PROMPTS[:4], DECODING, made[1], out)
    assert kept <= {row["key"] for row in lines(out)}
    assert [row["index"] for row in lines(out)] == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    "content", ["hello", '{"key": 3}\n', "[1, 2]\n", '{"a": 1}', '{"key": "a"}\nbroken\n{"key": "b"}\n']
)
def test_other_files_are_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(pt.DataError, match="no row of ours"), Store(path):
        pass
    assert path.read_text() == content


@pytest.mark.parametrize("torn", [b"{", b'{"key": "b', b'{"key": "b", "text": "\xc3'])
def test_a_torn_line_is_cut(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    with Store(path) as store:
        store.append([{"text": "é\ud800\u2028", "key": "a"}])
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    with Store(path) as store:
        assert store.rows == {"a": {"key": "a", "text": "é\ud800\u2028"}}
        assert path.read_bytes() == whole


def test_two_writers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with Store(path), pytest.raises(pt.ArgumentError, match="another process"), Store(path):
        pass
