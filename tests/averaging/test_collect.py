"""Best-of-n samples: the choice, rewards of all kinds, a model and a server, killed and resumed."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_model, make_tokenizer

import paretune as pt
from paretune.averaging.collect import best
from paretune.cli.main import main
from paretune.generation import Generation

PROMPTS = [f"the cat sees {word}" for word in ("the dog", "a bird", "the red bird", "no dog", "a big cat")]


class Stub:
    """An OpenAI-compatible completion server whose answers are a hash of prompt and seed, and that counts requests."""

    def __init__(self) -> None:
        self.asked: Counter[tuple[str, int]] = Counter()
        self.busy = self.most = 0
        self.on_request: Callable[[int], None] = lambda number: None
        lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    stub.asked[body["prompt"], body["seed"]] += 1
                    number = sum(stub.asked.values())
                    stub.busy += 1
                    stub.most = max(stub.most, stub.busy)
                stub.on_request(number)
                time.sleep(0.003)  # so that requests overlap
                text = f" answer {sum(body['prompt'].encode()) + body['seed'] % 7}"
                if number == 3:  # a server may fail now and then
                    status, content = 503, {"error": "busy"}
                else:
                    status, content = 200, {"choices": [{"text": text, "finish_reason": "stop"}]}
                raw = json.dumps(content).encode()
                with lock:
                    stub.busy -= 1
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(raw)))
                    self.end_headers()
                    self.wfile.write(raw)
                except OSError:
                    pass  # the client was killed

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def stub() -> Iterator[Stub]:
    found = Stub()
    yield found
    found.server.shutdown()
    found.server.server_close()


def length(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(len(completion) + completion.count("7")) for completion in completions]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_choice() -> None:
    texts = [["a", "b", "b ", "c"], ["d", "e", "f", "g"]]
    samples = [
        Generation(i, j, f"p{i}", text, text != "f", 1) for i, row in enumerate(texts) for j, text in enumerate(row)
    ]
    scores = [0.1, 0.9, 0.9, 0.5, 0.3, None, 0.8, 0.3]
    assert best(samples, scores) == [1, 6]
    assert best(samples, scores, keep=2) == [1, 3, 6, 4]  # "b " says the same as "b"; of equal scores the earlier
    assert best(samples, scores, keep=2, deduplicate=False) == [1, 2, 6, 4]
    assert best(samples, scores, finished_only=True) == [1, 4]
    assert best(samples, scores, threshold=0.85) == [1]
    assert best(samples, scores, keep=4, top_share=0.5) == [1, 3, 6]
    assert best(samples, scores, threshold=2.0) == []


def test_from_a_model(tmp_path: Path) -> None:
    """All ways to give a reward; the rows are what TRL reads; the best of what was sampled is kept."""
    model, tokenizer = make_model(), make_tokenizer()
    calls: list[int] = []

    def reward(completions: list[Any], **_: Any) -> list[float]:
        calls.append(len(completions))
        return [float(completion[0]["content"].split().count("cat")) for completion in completions]

    prompts = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    out = tmp_path / "best.jsonl"
    options: dict[str, Any] = {"n": 6, "max_new_tokens": 8, "tokenizer": tokenizer, "out": out, "progress": False}
    found = pt.collect_best_of_n(model, prompts, reward, **options)
    assert [row["prompt"] for row in rows(out)] == prompts == found["prompt"][:]
    sampled = rows(tmp_path / "best.samples.jsonl")
    assert len(sampled) == 30
    for index, row in enumerate(rows(out)):
        assert row["score"] == max(s["output"].split().count("cat") for s in sampled if s["index"] == index)
        assert row["completion"][0]["role"] == "assistant"
    assert sum(calls) == 30
    assert pt.collect_best_of_n(model, prompts, reward, **options)[:] == found[:]
    assert sum(calls) == 30  # nothing is scored twice
    scored = tmp_path / "scored.jsonl"
    scored.write_text("".join(json.dumps({**row, "score": row["sample"]}) + "\n" for row in sampled))
    last = pt.collect_best_of_n(model, prompts, scored, **options, deduplicate=False)
    assert last["sample"][:] == [5] * 5
    scored.write_text(scored.read_text().split("\n", 1)[1])
    with pytest.raises(pt.DataError, match="lacks 1 of 30"):
        pt.collect_best_of_n(model, prompts, scored, **options)
    with pytest.raises(pt.ArgumentError, match="holds scores of"):
        pt.collect_best_of_n(model, prompts, length, **options)
    source = "lambda prompts, completions: [{} for _ in completions]"
    other = options | {"out": tmp_path / "other.jsonl"}
    pt.collect_best_of_n(model, prompts, eval(source.format(1.0)), **other)
    pt.collect_best_of_n(model, prompts, eval(source.format(1.0)), **other)
    with pytest.raises(pt.ArgumentError, match="holds scores of"):  # of the same name, but it does something else
        pt.collect_best_of_n(model, prompts, eval(source.format(2.0)), **other)
    with pytest.raises(pt.DataError, match="nan"):
        pt.collect_best_of_n(model, prompts, lambda p, c: [float("nan")] * len(c), n=2, tokenizer=tokenizer,
                             max_new_tokens=2, progress=False)  # fmt: skip

    ratios_data = [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows(out)]
    from paretune.averaging.samples import encode

    first = encode(ratios_data, tokenizer)[0]
    text = tokenizer.decode(first.ids[first.start :])
    assert text == f"{rows(out)[0]['completion'][0]['content']} <eos>".strip()


def test_natural_forms(world: Path, tmp_path: Path) -> None:
    """A model without its tokenizer, or its path; prompts as texts, rows, a data set or a file; a reward of texts."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    path = world / "reference"
    model = AutoModelForCausalLM.from_pretrained(path)
    options: dict[str, Any] = {"n": 3, "max_new_tokens": 4, "progress": False}
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    whole = pt.collect_best_of_n(model, chats, lambda texts: [len(text) for text in texts], **options)
    wanted = [len(row[0]["content"]) for row in whole["completion"]]
    assert whole["score"][:] == wanted
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    for source, prompts in ((path, file), (str(path), Dataset.from_dict({"prompt": chats})), (model, str(file))):
        found = pt.collect_best_of_n(source, prompts, lambda completions: [len(c[0]["content"]) for c in completions],
                                     **options)  # fmt: skip
        assert found[:] == whole[:]
    for prompts, reward, said in (
        ([{"text": "the cat"}], length, "rows with prompt"),
        (PROMPTS, model, "load_reward"),
        (PROMPTS, None, "load_reward"),
    ):
        with pytest.raises(pt.ArgumentError, match=said):
            pt.collect_best_of_n(model, prompts, reward, **options)
    with pytest.raises(pt.DataError, match="gave 1 scores for 15"):
        pt.collect_best_of_n(model, PROMPTS, lambda texts: 1.0, **options)


def test_wrong_arguments(tmp_path: Path) -> None:
    for wrong in (
        {"n": 0}, {"keep": 9}, {"top_share": 0.0}, {"top_share": 1.5}, {"threshold": float("nan")},
        {"out": tmp_path / "x.txt"}, {"prompts": []}, {"prompts": [[1, 2]]}, {"temperature": -1.0},
    ):  # fmt: skip
        with pytest.raises(pt.ArgumentError):
            pt.collect_best_of_n(**{"model": "absent", "prompts": PROMPTS, "reward": length, **wrong})


@pytest.mark.parametrize("moment", ["sampling", "scoring"])
def test_killed_and_resumed(moment: str, stub: Stub, tmp_path: Path) -> None:
    """SIGKILL in the middle: the second run asks only for what is missing, and the result is that of a whole run."""
    endpoint = pt.Endpoint(stub.url, "stub", concurrency=2, retries=3, pause=0.01)
    options: dict[str, Any] = {"n": 30, "max_new_tokens": 4, "progress": False}
    scored: list[str] = []

    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        scored.extend(completions)
        return length(prompts, completions)

    whole = tmp_path / "whole.jsonl"
    pt.collect_best_of_n(endpoint, PROMPTS, reward, out=whole, **options)
    assert stub.most == 2
    asked, calls = dict(stub.asked), len(scored)
    assert len(asked) == calls == 150
    out = tmp_path / "killed.jsonl"
    stub.asked.clear()
    child = os.fork()
    if child == 0:

        def dying(prompts: list[str], completions: list[str]) -> list[float]:
            if moment == "scoring" and len(rows(tmp_path / "killed.scores.jsonl")) >= 64:
                os.kill(os.getpid(), signal.SIGKILL)
            return length(prompts, completions)

        pt.collect_best_of_n(endpoint, PROMPTS, dying, out=out, reward_name="length", **options)
        os._exit(0)
    if moment == "sampling":
        stub.on_request = lambda number: os.kill(child, signal.SIGKILL) if number == 70 else None
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    stub.on_request = lambda number: None
    assert not out.exists()
    kept = len(rows(tmp_path / "killed.samples.jsonl"))
    scored.clear()
    pt.collect_best_of_n(endpoint, PROMPTS, reward, out=out, reward_name="length", **options)
    assert rows(out) == rows(whole)
    assert {key for key, _ in stub.asked.items()} == set(asked)
    repeated = sum(stub.asked.values()) - len(asked) - 1  # one is the server's own failure
    if moment == "sampling":
        assert 0 < kept < 150
        assert repeated <= 72 - kept  # what was on its way, from the server to the file, when it died
        assert len(scored) == 150
    else:
        assert kept == 150
        assert repeated == 0
        assert len(scored) == 150 - 64
    keys = [row["key"] for row in rows(tmp_path / "killed.samples.jsonl")]
    assert len(set(keys)) == len(keys) == 150


def test_command(stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    (tmp_path / "reward.py").write_text("def length(completions, **_):\n    return [len(c) for c in completions]\n")
    arguments = ["average", "collect", "stub", "--endpoint", stub.url, "--raw", "--prompts", tmp_path / "prompts.jsonl"]
    arguments += ["--n", 4, "--max-new-tokens", 4, "-o", tmp_path / "best.jsonl", "--quiet", "--json"]
    command = [str(each) for each in arguments]
    assert main([*command, "--reward", f"{tmp_path / 'reward.py'}:length"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 5
    assert all(isinstance(row["completion"], str) for row in rows(tmp_path / "best.jsonl"))
    assert main(command) == 2
    assert "--reward" in capsys.readouterr().err
