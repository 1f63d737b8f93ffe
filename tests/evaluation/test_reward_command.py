"""``paretune score``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from stub_server import chat, serving

from paretune.cli.main import main


def write(path: Path, answers: list[tuple[str, str]]) -> str:
    rows = [{"instruction": prompt, "output": text, "generator": "m"} for prompt, text in answers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    mine = [(f"request {i}", "good" if i % 3 else "so so") for i in range(6)]
    return write(tmp_path / "mine.jsonl", mine), write(tmp_path / "others.jsonl", [(p, "bad") for p, _ in mine[::-1]])


def test_a_function(world: Path, files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "reward.py").write_text("def length(completions, **_):\n    return [len(c) for c in completions]\n")
    out = tmp_path / "scores.jsonl"
    assert main(["score", files[0], "--reward", f"{tmp_path / 'reward.py'}:length", "-o", str(out), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["mean"], shown["items"], shown["failed"]) == (pytest.approx(26 / 6), 6, 0)
    assert shown["interval"][0] <= shown["mean"] <= shown["interval"][1]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows[0] == {"index": 0, "sample": 0, "instruction": "request 0", "score": 5.0}


def test_a_judge(files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(body: dict[str, Any], number: int) -> dict[str, Any]:
        text = body["messages"][0]["content"]
        if "request 5" in text:
            return chat("No idea.")
        return chat("[[A]]" if "<answer_a>\ngood" in text or "<answer_a>\nso so" in text else "[[B]]")

    with serving(answer) as server:
        command = ["score", files[0], "--others", files[1], "--reward", f"judge:stub@{server.url}"]
        for asked in (4 * 2 + 2 + 2 * 3, 2 * 3):
            before = len(server.requests)
            assert main([*command, "--cache", str(tmp_path / "verdicts.jsonl")]) == 0
            assert len(server.requests) - before == asked
    shown = capsys.readouterr().out
    assert "scored           5 of 6 answers" in shown
    assert "not AlpacaEval's official one" in shown
    assert "failed 2" in shown
    assert "unreadable 6" in shown


def test_a_judges_server_is_as_it_was_named(
    files: tuple[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGES_KEY", "secret")
    with serving(lambda *_: chat("[[7]]"), delay=0.02) as server:
        command = ["score", files[0], "--reward", f"rating:stub@{server.url}", "--api-key-env", "JUDGES_KEY"]
        assert main([*command, "--concurrency", "1"]) == 0
        assert {request["authorization"] for request in server.requests} == {"Bearer secret"}
        assert server.most == 1
    assert "secret" not in capsys.readouterr().out
    assert main([*command, "--timeout", "0"]) == 2
    assert "timeout=0.0: give a positive number of seconds" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--reward", "nothing"], "reward='nothing'"),
        (["--reward", "math:fsum", "--others", "{others}"], "scores each answer alone"),
        (["--reward", "judge:m@http://h/v1"], "others=None"),
        (["--reward", "math:fsum", "-o", "/nowhere/x"], "out='/nowhere/x'"),
        (["{none}", "--reward", "math:fsum"], "cannot be read"),
    ],
)
def test_wrong_use(files: tuple[str, str], capsys: pytest.CaptureFixture[str], more: list[str], says: str) -> None:
    more = [text.format(others=files[1], none=files[0] + "x") for text in more]
    assert main(["score", files[0], *more]) == 2
    out, err = capsys.readouterr()
    assert says in err
    assert (out, err.count("\n")) == ("", 1)
