"""``paretune generate``."""

from __future__ import annotations

import gzip
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from stub_server import chat, serving

from paretune.cli.main import main


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    return write(tmp_path / "p.jsonl", [{"instruction": "the cat"}, {"instruction": "a dog sees"}])


def test_generate(world: Path, tmp_path: Path, prompts: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "G.jsonl"
    command = ["generate", str(world / "reference"), "--prompts", prompts, "-o", str(out), "--max-new-tokens", "5"]
    assert main([*command, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["files"], shown["answers"]) == ([str(out)], 2)
    assert [row["prompt"] for row in lines(out)] == [
        [{"role": "user", "content": text}] for text in ("the cat", "a dog sees")
    ]
    assert lines(out)[0]["generator"] == str(world / "reference")
    assert main([*command, "--raw"]) == 2  # other prompts than those of the file
    assert "not asked for" in capsys.readouterr().err
    assert main([*command[:-3], str(tmp_path / "raw.jsonl"), "--max-new-tokens", "5", "--raw", "--limit", "1"]) == 0
    assert lines(tmp_path / "raw.jsonl")[0]["prompt"] == "the cat"
    assert "1 answers" in capsys.readouterr().out


def test_two_turns(world: Path, tmp_path: Path) -> None:
    asked = write(tmp_path / "mt.jsonl", [{"question_id": 81, "turns": ["the cat", "and a dog"]}])
    command = ["generate", str(world / "reference"), "--prompts", asked, "-o", str(tmp_path / "G.jsonl")]
    for _ in range(2):  # the second time everything is there
        assert main([*command, "--max-new-tokens", "4"]) == 0
    first, second = lines(tmp_path / "G.jsonl")[0], lines(tmp_path / "G.turn2.jsonl")[0]
    assert [turn["content"] for turn in second["prompt"]] == ["the cat", first["output"], "and a dog"]
    assert second["instruction"] == "and a dog"


def test_server(tmp_path: Path, prompts: str) -> None:
    with serving(lambda body, _: chat(body["messages"][0]["content"].upper())) as server:
        command = ["generate", "stub", "--endpoint", server.url, "--prompts", prompts, "-o", str(tmp_path / "G.jsonl")]
        assert main(command) == 0
    assert [row["output"] for row in lines(tmp_path / "G.jsonl")] == ["THE CAT", "A DOG SEES"]


def test_kinds_of_prompt_files(world: Path, tmp_path: Path) -> None:
    turn = {"role": "user", "content": "the cat"}
    listed = tmp_path / "p.json.gz"
    rows = [{"prompt": [turn]}, {"messages": [turn, {"role": "assistant", "content": "a dog"}]}, {"prompt": "the cat"}]
    listed.write_bytes(gzip.compress(json.dumps(rows).encode()))
    out = tmp_path / "G.jsonl"
    assert (
        main(["generate", str(world / "base"), "--prompts", str(listed), "-o", str(out), "--max-new-tokens", "4"]) == 0
    )
    assert [row["prompt"] for row in lines(out)] == [[turn]] * 3


@pytest.mark.parametrize(
    ("rows", "more", "says"),
    [
        ([{"question": "a"}], [], "row 1 has no text or conversation"),
        ([], [], "holds no rows"),
        ([{"instruction": ""}], [], "row 1 has no text"),
        ([{"turns": ["a", "b"]}, {"turns": ["a"]}], [], "one and of two turns"),
        ([{"turns": ["a", "b"]}], ["--temperature", "1", "--samples", "2"], "samples=2"),
        ([{"instruction": "a"}], ["--temperature", "-1"], "temperature=-1.0"),
        ([{"instruction": "a"}], ["--limit", "0"], "limit=0"),
        ([{"instruction": "a"}], ["--endpoint", "nowhere"], "url='nowhere'"),
        ([{"instruction": "a"}], ["--device", "cuda:99"], "device='cuda:99'"),
        ([{"instruction": "a"}], ["--device", "gpu"], "device='gpu'"),
        ([{"instruction": "a"}], ["-o", "/proc/x/G.jsonl"], "out='/proc/x/G.jsonl'"),
        ([{"instruction": "a " * 80}], [], "max_new_tokens=4"),
    ],
)
def test_wrong_use(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[Any], more: list[str], says: str
) -> None:
    asked = write(tmp_path / "p.jsonl", rows)
    command = ["generate", str(world / "base"), "--prompts", asked, "-o", str(tmp_path / "G.jsonl")]
    assert main([*command, "--max-new-tokens", "4", *more]) == 2
    out, err = capsys.readouterr()
    assert says in err
    assert (out, err.count("\n")) == ("", 1)


@pytest.mark.parametrize("page", ["generate.md", "reward.md"])
def test_commands_of_the_pages_are_understood(page: str) -> None:
    from paretune.cli.main import build_parser

    text = (Path(__file__).parents[2] / "docs" / page).read_text()
    for line in text.splitlines():
        if line.startswith("paretune "):
            words = shlex.split(line)[1:]
            build_parser(words[0]).parse_args(words)


def test_no_such_model(tmp_path: Path, prompts: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tmp_path / "none"), "--prompts", prompts, "-o", str(tmp_path / "G.jsonl")]) == 2
    assert "none: there is no such model: give a directory or a hub id" in capsys.readouterr().err


def test_a_folder_without_a_model(tmp_path: Path, prompts: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tmp_path), "--prompts", prompts, "-o", str(tmp_path / "G.jsonl")]) == 2
    assert "holds no config.json: give the directory of a model" in capsys.readouterr().err
