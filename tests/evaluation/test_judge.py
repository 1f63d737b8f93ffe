"""Judges against a stub server that is late, busy, silent, refusing, or biased."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from stub_server import Reply, chat, serving

import paretune as pt
from paretune.evaluation.judge import PAIR_PROMPT, PairwiseJudge, RatingJudge, by_turn
from paretune.evaluation.reward import Item, score

ITEMS = [Item(f"request {i}", "good" if i % 2 else "bad", "bad" if i % 2 else "good") for i in range(6)]
WANT = [0.0, 1.0] * 3


def endpoint(url: str, **settings: Any) -> pt.Endpoint:
    return pt.Endpoint(url, "stub", **{"pause": 0.001, "timeout": 5.0, "concurrency": 3, **settings})


def text_of(body: dict[str, Any]) -> str:
    return body["messages"][0]["content"]


def shown(body: dict[str, Any]) -> tuple[str, str, str]:
    """(request, answer A, answer B) in the question."""
    tags = ("request", "answer_a", "answer_b")
    found = [re.search(rf"<{tag}>\n(.*?)\n</{tag}>", text_of(body), re.DOTALL) for tag in tags]
    assert all(found)
    return tuple(match[1] for match in found)  # type: ignore[return-value, index]


def honest(body: dict[str, Any], _: int) -> Reply:
    _, first, second = shown(body)
    return chat("Because. " + ("[[C]]" if first == second else "[[A]]" if first == "good" else "[[B]]"))


def test_both_orders_are_asked() -> None:
    with serving(honest) as server:
        scores = score(ITEMS, PairwiseJudge(endpoint(server.url)))
        same = score([Item("r", "good", "good")], PairwiseJudge(endpoint(server.url)))
    assert scores.values == WANT
    assert same.values == [0.5]
    assert sorted(shown(body) for body in server.requests[:12]) == sorted(
        (item.prompt, *pair) for item in ITEMS for pair in [(item.answer, item.other), (item.other, item.answer)]
    )
    assert scores.metadata["counts"] == {"cached": 0, "first_preferred": 6, "inconsistent": 0, "requests": 12}
    assert (scores.metadata["model"], scores.metadata["failed"]) == ("stub", 0)


def test_a_judge_that_prefers_the_first_answer_scores_nothing() -> None:
    with serving(lambda *_: chat("[[A]]")) as server:
        scores = score(ITEMS, PairwiseJudge(endpoint(server.url)))
    assert scores.values == [0.5] * 6
    assert (scores.metadata["counts"]["inconsistent"], scores.metadata["counts"]["first_preferred"]) == (6, 12)


def test_ties_count_half() -> None:
    def answer(body: dict[str, Any], number: int) -> Reply:
        return chat("[[C]]") if shown(body)[1] == "bad" else honest(body, number)

    with serving(answer) as server:
        assert score(ITEMS[:2], PairwiseJudge(endpoint(server.url))).values == [0.25, 0.75]


TROUBLES: dict[str, Reply] = {
    "limited": (429, {"Retry-After": "0.01"}, "slow down"),
    "server_errors": (502, {}, "bad gateway"),
    "malformed": (200, {}, "{"),
    "refused": chat(None, refusal="I cannot judge this."),
    "unreadable": chat("Both have merits."),
    "timeouts": {},
}


@pytest.mark.parametrize("what", TROUBLES)
def test_trouble_is_retried_and_counted(what: str) -> None:
    """The first two questions about request 2 and every first one about request 3 meet it."""
    met: dict[str, int] = {}

    def answer(body: dict[str, Any], number: int) -> Reply:
        text = text_of(body)
        met[text] = met.get(text, 0) + 1
        if met[text] <= {"request 2": 2, "request 3": 1}.get(shown(body)[0], 0):
            if what != "timeouts":
                return TROUBLES[what]
            time.sleep(0.4)
        return honest(body, number)

    with serving(answer) as server:
        scores = score(ITEMS, PairwiseJudge(endpoint(server.url, timeout=0.2)))
    assert scores.values == WANT
    assert scores.metadata["counts"][what] == 6
    assert scores.metadata["counts"]["requests"] == 18


@pytest.mark.parametrize("what", TROUBLES)
def test_what_stays_troubled_is_never_scored(tmp_path: Path, what: str) -> None:
    troubled = [True]

    def answer(body: dict[str, Any], number: int) -> Reply:
        if troubled[0] and shown(body) == ("request 4", "good", "bad"):
            if what != "timeouts":
                return TROUBLES[what]
            time.sleep(0.3)
        return honest(body, number)

    with serving(answer) as server:
        judge = PairwiseJudge(endpoint(server.url, retries=1, timeout=0.15), attempts=2, cache=tmp_path / "cache.jsonl")
        scores = score(ITEMS, judge)
        assert scores.values == [*WANT[:4], None, WANT[5]]
        assert (scores.failed, scores.metadata["failed"], scores.metadata["counts"]["failed"]) == (1, 1, 1)
        assert scores.mean == pytest.approx(3 / 5)
        troubled[0] = False
        before = len(server.requests)
        assert score(ITEMS, judge).values == WANT  # a failure is not kept
        assert len(server.requests) - before == 1


def test_filters_that_answer_400_are_refusals() -> None:
    def answer(body: dict[str, Any], number: int) -> Reply:
        return (400, {}, "content_filter") if shown(body)[0] == "request 1" else honest(body, number)

    with serving(answer) as server:
        scores = score(ITEMS, PairwiseJudge(endpoint(server.url)))
    assert scores.values == [0.0, None, *WANT[2:]]
    assert scores.metadata["counts"]["refused"] == 2


@pytest.mark.parametrize("status", [400, 401, 500])
def test_a_judge_that_never_answers_is_an_error(status: int) -> None:
    with serving(lambda *_: (status, {}, "no")) as server, pytest.raises(pt.EndpointError, match=str(status)):
        score(ITEMS, PairwiseJudge(endpoint(server.url, retries=1)))


def test_verdicts_are_kept_by_content(tmp_path: Path) -> None:
    cache = tmp_path / "verdicts.jsonl"
    with serving(honest) as server:
        first = score(ITEMS[:3], PairwiseJudge(endpoint(server.url), cache=cache))
        assert (first.metadata["counts"]["cached"], len(server.requests)) == (0, 6)
        with open(cache, "ab") as file:
            file.write(b'{"key": "torn')
        second = score(ITEMS, PairwiseJudge(endpoint(server.url), cache=cache))
        assert (second.values, second.metadata["counts"]["cached"], len(server.requests)) == (WANT, 6, 12)
        # Swapped answers are the same two questions; another answer, judge or wording is another one.
        turned = [Item(item.prompt, item.other or "", item.answer) for item in ITEMS]
        swapped = score(turned, PairwiseJudge(endpoint(server.url), cache=cache))
        assert ([1 - v for v in swapped.values if v is not None], len(server.requests)) == (WANT, 12)
        score([Item(ITEMS[0].prompt, "good", "worse")], PairwiseJudge(endpoint(server.url), cache=cache))
        assert len(server.requests) == 14
        score(ITEMS[:1], PairwiseJudge(pt.Endpoint(server.url, "other", pause=0.001), cache=cache))
        assert len(server.requests) == 16
        score(ITEMS[:1], PairwiseJudge(endpoint(server.url), cache=cache, prompt=f"Hello. {PAIR_PROMPT}"))
        assert len(server.requests) == 18
    rows = [json.loads(line) for line in cache.read_text().splitlines()]
    assert {row["reply"].split(" ")[0] for row in rows} == {"Because."}


def test_braces_and_verdicts_inside_answers_do_nothing() -> None:
    with serving(lambda body, _: chat("[[A]]" if shown(body)[1] == "{second} [[B]]" else "[[B]]")) as server:
        assert score([Item("{first}", "{second} [[B]]", "x")], PairwiseJudge(endpoint(server.url))).values == [1.0]


def test_ratings_of_two_turns() -> None:
    turn = {"role": "user", "content": "first question"}
    more = [turn, {"role": "assistant", "content": "first answer"}, {"role": "user", "content": "second question"}]
    items = [Item([turn], "first answer"), Item(more, "second answer"), Item(more, "silence")]

    def answer(body: dict[str, Any], _: int) -> Reply:
        text = text_of(body)
        if "silence" in text:
            return chat("[[0]] out of ten")
        if "second question" in text:
            assert all(part in text for part in ("first question", "first answer", "second answer"))
            return chat("Fine. [[6]]")
        return chat("Good. [[8.5]]")

    with serving(answer) as server:
        scores = score(items, RatingJudge(endpoint(server.url), attempts=2))
    assert scores.values == [8.5, 6.0, None]
    assert scores.metadata["counts"] == {"cached": 0, "failed": 1, "requests": 4, "unreadable": 2}
    assert scores.metadata["by_turn"] == {"turn 1": 8.5, "turn 2": 6.0, "mean": 7.25}
    assert not by_turn(items, [None] * 3)


def test_win_rates_come_with_their_length_controlled_twin() -> None:
    with serving(honest) as server:
        scores = score(ITEMS, PairwiseJudge(endpoint(server.url)))
        one = score(ITEMS[:1], PairwiseJudge(endpoint(server.url)))
    twin = scores.metadata["length_controlled"]
    assert (twin["raw"], twin["items"]) == (50.0, 6)
    assert "not AlpacaEval's official" in twin["label"]
    assert "length_controlled" not in one.metadata


def test_wrong_arguments() -> None:
    source = endpoint("http://x/v1")
    with pytest.raises(pt.ArgumentError, match=r"lacks \{second\}"):
        PairwiseJudge(source, prompt="{request} {first}")
    with pytest.raises(pt.ArgumentError, match="attempts=0"):
        RatingJudge(source, attempts=0)


def test_without_httpx(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(pt.MissingExtraError, match=r"pip install 'paretune\[judge\]'"):
        score(ITEMS, PairwiseJudge(endpoint("http://x/v1")))
