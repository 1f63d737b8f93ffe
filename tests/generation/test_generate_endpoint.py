"""Answers of a server, against a stub that misbehaves."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from stub_server import Reply, chat, completion, serving

import paretune as pt
from paretune.generation.endpoint import Client

CHATS: list[Any] = [[{"role": "user", "content": f"question {i}"}] for i in range(6)]


def echo(body: dict[str, Any], _: int) -> Reply:
    if "messages" in body:
        return chat(f"{body['messages'][-1]['content']} {body['seed']}")
    return completion(f"{body['prompt']} {body['seed']}")


def endpoint(url: str, **settings: Any) -> pt.Endpoint:
    return pt.Endpoint(url, "stub", **{"pause": 0.001, "timeout": 5.0, **settings})


def test_answers_and_what_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    decoding = pt.Decoding(9, temperature=0.5, top_p=0.9, samples=2, stop=("x",))
    with serving(echo, delay=0.02) as server:
        answers = pt.generate(
            endpoint(server.url, api_key_env="MY_KEY", concurrency=3), [*CHATS, "go on", [4, 5]], decoding
        )
    assert server.most <= 3
    assert [(a.index, a.sample) for a in answers] == [(i, s) for i in range(8) for s in range(2)]
    assert answers[2].text.startswith("question 1 ")
    assert (answers[2].finished, answers[2].tokens) == (True, 3)
    assert (answers[12].finished, answers[12].tokens) == (False, None)
    assert len({a.text for a in answers}) == 16  # every sample has its own seed
    assert {r["path"] for r in server.requests} == {"/v1/chat/completions", "/v1/completions"}
    first = server.requests[0]
    assert first["authorization"] == "Bearer secret"
    assert (first["model"], first["max_tokens"], first["temperature"], first["stop"]) == ("stub", 9, 0.5, ["x"])


def test_seeds_do_not_depend_on_the_order() -> None:
    with serving(echo) as server:
        some = pt.generate(endpoint(server.url), CHATS[2:4], pt.Decoding(4, temperature=1.0))
        every = pt.generate(endpoint(server.url), CHATS, pt.Decoding(4, temperature=1.0))
    assert [a.text for a in some] == [a.text for a in every[2:4]]


TROUBLES: dict[str, Reply] = {
    "limited": (429, {"Retry-After": "0.05"}, "slow down"),
    "server_errors": (503, {}, "busy"),
    "malformed": (200, {}, "<html>"),
}


@pytest.mark.parametrize("reply", [*TROUBLES.values(), {"choices": []}, chat(None), {"choices": None}])
def test_trouble_is_retried_and_counted(reply: Reply) -> None:
    what = next((name for name, each in TROUBLES.items() if each == reply), "malformed")
    with serving(lambda body, number: reply if number < 3 else echo(body, number)) as server:
        with Client(endpoint(server.url)) as client:
            began = time.monotonic()
            client.ask(
                "chat/completions",
                {"messages": CHATS[0], "seed": 1},
                lambda a: a["choices"][0]["message"]["content"] + "",
            )
            assert client.counts == {"requests": 3, what: 2}
        assert time.monotonic() - began >= (0.1 if what == "limited" else 0)
        answers = pt.generate(endpoint(server.url), CHATS, pt.Decoding(4))
    assert [a.text.rsplit(" ", 1)[0] for a in answers] == [f"question {i}" for i in range(6)]


def test_timeouts_and_lost_connections() -> None:
    def slow(body: dict[str, Any], number: int) -> Reply:
        if number == 1:
            time.sleep(0.3)
        return echo(body, number)

    with serving(slow) as server, Client(endpoint(server.url, timeout=0.1)) as client:
        client.ask("completions", {"prompt": "a", "seed": 1}, lambda a: a["choices"][0])
        assert client.counts == {"requests": 2, "timeouts": 1}
    with Client(endpoint(server.url, retries=1)) as client:
        with pytest.raises(pt.EndpointError, match=r"cannot be reached.*2 times"):
            client.ask("completions", {}, lambda a: a)
        assert client.counts["disconnected"] == 2


def test_failing_for_good_keeps_what_is_done(tmp_path: Path) -> None:
    out, broken = tmp_path / "G.jsonl", [True]

    def answer(body: dict[str, Any], number: int) -> Reply:
        if broken[0] and body["messages"][-1]["content"] == "question 4":
            return 500, {}, "no"
        return echo(body, number)

    with serving(answer) as server:
        source = endpoint(server.url, concurrency=1, retries=2)
        with pytest.raises(pt.EndpointError, match="answers 500: no, 3 times"):
            pt.generate(source, CHATS, pt.Decoding(4), out=out)
        kept = out.read_text().count("\n")
        assert kept >= 1
        broken[0] = False
        before = len(server.requests)
        assert len(pt.generate(source, CHATS, pt.Decoding(4), out=out)) == 6
        assert len(server.requests) - before == 6 - kept


def test_refused_requests_are_not_repeated() -> None:
    with serving(lambda *_: (401, {}, "bad key")) as server:
        with pytest.raises(pt.EndpointError, match=r"401: bad key.*OPENAI_API_KEY"):
            pt.generate(endpoint(server.url, concurrency=1), CHATS[:1], pt.Decoding(4))
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    "settings", [{"url": "localhost:8000"}, {"model": ""}, {"concurrency": 0}, {"timeout": 0}, {"retries": -1}]
)
def test_wrong_endpoint(settings: dict[str, Any]) -> None:
    with pytest.raises(pt.ArgumentError, match=next(iter(settings))):
        pt.Endpoint(**{"url": "http://x/v1", "model": "m", **settings})
    with pytest.raises(pt.ArgumentError, match="is no address"):
        Client(pt.Endpoint("http://host:port/v1", "m"))


def test_requests_do_not_run_ahead_of_what_is_kept() -> None:
    """A kill loses no more answers than are asked for at a time, however slowly they are written."""
    asked: list[int] = []
    with Client(pt.Endpoint("http://localhost:1/v1", "m", concurrency=3)) as client:
        for kept, (task, _) in enumerate(client.each(range(20), asked.append)):
            time.sleep(0.003)
            assert task in asked
            assert len(asked) <= kept + 3
    assert sorted(asked) == list(range(20))
