"""The harness as a library: equal to its own command item by item, equal prompts for all models, no confusion."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from published_rows import write_all, write_jsonl
from tiny_models import CHAT_TEMPLATE, make_model, make_tokenizer

from paretune.errors import ArgumentError, DataError, MissingExtraError
from paretune.evaluation.capability import Benchmarks, item_score
from paretune.evaluation.suite import Suite, built_in, load, parse

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
WORDS = ["dog", "bird", "cat", "red", "blue", "green"]
OWN = """
suite: own
tasks:
  - {task: say, kind: exact, file: say.jsonl, shots: 1, max_tokens: 4, category: talk}
  - {task: choose, kind: multiple-choice, file: choose.jsonl, shots: 1, category: choice}
  - {task: local_gsm8k, harness: HERE/gsm8k.yaml, metric: exact_match, filter: last, shots: 2, max_tokens: 4,
     category: math}
"""
HARNESS_TASK = """
task: local_gsm8k
dataset_path: json
dataset_kwargs: {data_files: {train: HERE/train.jsonl, test: HERE/test.jsonl}}
output_type: generate_until
training_split: train
fewshot_split: train
test_split: test
doc_to_text: "{{question}} :"
doc_to_target: "{{answer}}"
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
generation_kwargs: {until: ["<eos>"], do_sample: false}
filter_list:
  - {name: first, filter: [{function: take_first}]}
  - {name: last, filter: [{function: regex, regex_pattern: "(\\\\w+)", group_select: -1}, {function: take_first}]}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A suite of two tasks of ours and one of the harness's, with its data."""
    here = tmp_path_factory.mktemp("own")
    pairs = [(f"the {a} sees the {b}", a) for a in WORDS for b in WORDS if a != b]
    write_jsonl(here / "say.jsonl", [{"prompt": p, "answer": a} for p, a in pairs[:12]])
    choices = [
        {"question": p, "choices": ["please", "thanks", "no"], "answer": "ABC"[i % 3]}
        for i, (p, _) in enumerate(pairs[:12])
    ]
    write_jsonl(here / "choose.jsonl", choices)
    for name, part in (("train", pairs[12:20]), ("test", pairs[20:])):
        write_jsonl(here / f"{name}.jsonl", [{"question": p, "answer": a} for p, a in part])
    (here / "gsm8k.yaml").write_text(HARNESS_TASK.replace("HERE", str(here)))
    (here / "own.yaml").write_text(OWN.replace("HERE", str(here)))
    return here


@pytest.fixture(scope="module")
def benchmarks(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Benchmarks:
    return Benchmarks(load(str(folder / "own.yaml")))


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("mirror"))


def test_equals_simple_evaluate_item_by_item(benchmarks: Benchmarks, folder: Path) -> None:
    """The harness's own entry point, with fresh tasks, says the same of every item."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer = make_model(seed=1).eval(), make_tokenizer()
    ours = benchmarks.measure(model, tokenizer)
    again = Benchmarks(load(str(folder / "own.yaml")))
    tasks = [task for each in again._tasks.values() for task in each.values()]
    for _ in range(2):
        found: Any = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
            tasks=tasks,
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0,
        )
        for name, metric, wanted in (
            ("say", "exact", "none"),
            ("choose", "acc", "none"),
            ("local_gsm8k", "exact_match", "last"),
        ):
            theirs = [sample for sample in found["samples"][name] if sample["filter"] == wanted]
            assert [sample[metric] for sample in theirs] == list(ours.items[name].scores)
            assert [sample["arguments"][0][0] for sample in theirs] == [s["prompt"] for s in ours.samples[name]]
            assert found["results"][name][f"{metric},{wanted}"] == pytest.approx(ours.items[name].mean)
    assert 0 < sum(ours.items["choose"].scores) < 12  # the comparison would notice a difference


def test_every_model_reads_the_same(benchmarks: Benchmarks) -> None:
    """Examples are drawn anew for each model from the same seed: a task built once gives no model other prompts."""
    tokenizer = make_tokenizer()
    first = benchmarks.measure(make_model(seed=1).eval(), tokenizer)
    second = benchmarks.measure(make_model(seed=2).eval(), tokenizer)
    assert first.prompts == second.prompts
    assert {n: i.ids for n, i in first.items.items()} == {n: i.ids for n, i in second.items.items()}
    answers = [[s["answer"] for s in each.samples["say"]] for each in (first, second)]
    assert answers[0] != answers[1]


def test_a_model_changed_in_place_is_another_model(benchmarks: Benchmarks) -> None:
    """No cache between calls: the same object with other weights gives other answers, and back again."""
    model, tokenizer = make_model(seed=1).eval(), make_tokenizer()
    before = benchmarks.measure(model, tokenizer)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(make_model(seed=3).state_dict())
    other = benchmarks.measure(model, tokenizer)
    fresh = benchmarks.measure(make_model(seed=3).eval(), tokenizer)
    model.load_state_dict(state)
    assert other == fresh
    assert other.samples["say"] != before.samples["say"]
    assert benchmarks.measure(model, tokenizer) == before


def test_the_suite_decides_decoding(benchmarks: Benchmarks) -> None:
    """What a checkpoint carries in generation_config.json would change its answers, and only its own."""
    tokenizer = make_tokenizer()
    plain = benchmarks.measure(make_model(seed=1).eval(), tokenizer)
    model = make_model(seed=1).eval()
    model.generation_config.max_new_tokens = 1
    model.generation_config.repetition_penalty = 9.0
    model.generation_config.suppress_tokens = [7, 8, 9]
    own = model.generation_config
    assert benchmarks.measure(model, tokenizer) == plain
    assert model.generation_config is own


def test_sampled_answers_come_again(folder: Path) -> None:
    """A task with a temperature draws the same for every call, whatever the global generators were."""
    warm = Benchmarks(_suite("task: a, kind: exact, file: say.jsonl, max_tokens: 6, temperature: 1.0"), data=folder)
    model, tokenizer = make_model(seed=1).eval(), make_tokenizer()
    torch.manual_seed(1)
    first = warm.measure(model, tokenizer)
    torch.manual_seed(2)
    expected = torch.rand(1).item()
    torch.manual_seed(2)
    assert warm.measure(model, tokenizer) == first
    assert torch.rand(1).item() == expected
    greedy = Benchmarks(_suite("task: a, kind: exact, file: say.jsonl, max_tokens: 6"), data=folder)
    assert greedy.measure(model, tokenizer).samples != first.samples


def test_the_global_generators_are_untouched(benchmarks: Benchmarks) -> None:
    model = make_model().eval()
    torch.manual_seed(5)
    random.seed(5)
    expected = torch.rand(1).item(), random.random()
    torch.manual_seed(5)
    random.seed(5)
    benchmarks.measure(model, make_tokenizer())
    assert (torch.rand(1).item(), random.random()) == expected


@pytest.fixture
def punkt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """nltk's sentence splitter, without anything that it learned."""
    nltk = pytest.importorskip("nltk")
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        file = tmp_path / "nltk" / "tokenizers" / "punkt_tab" / "english" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk")])
    return tmp_path / "nltk"


@pytest.mark.parametrize(
    ("answer", "right"),
    [("hello there. i agree with you!", [1, 1, 0]), ("Hello, there", [0, 0, 0]), ("hello BIG WIDE WORLD", [1, 0, 1])],
)
def test_ifeval_scores_what_its_instructions_say(
    answer: str, right: list[int], mirror: Path, punkt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No comma; all lowercase; no comma and at least 3 words in capitals, which wants nltk's splitter."""
    from lm_eval.models.huggingface import HFLM

    pytest.importorskip("langdetect")
    monkeypatch.setattr(HFLM, "generate_until", lambda lm, requests, **_: [answer] * len(requests))
    benchmarks = Benchmarks(built_in()["online-merging"].only(["ifeval"]), data=mirror)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    assert benchmarks.measure(_long_model(), tokenizer).items["ifeval"].scores == tuple(map(float, right))


def test_ifeval_without_its_splitter_stops_at_once(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness goes on without it, and would fail after all answers are written."""
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(nltk, "download", lambda *_, **__: False)
    with pytest.raises(DataError, match=r"task ifeval: needs nltk's punkt_tab, .* or leave ifeval out"):
        Benchmarks(built_in()["online-merging"].only(["ifeval"]), data=mirror)


@pytest.mark.parametrize("name", ["alignment-tax", "xright", "online-merging", "tiny-world"])
def test_built_in_suites_on_published_layouts(name: str, mirror: Path, punkt: Path) -> None:
    """Every task of every suite is built, asked and scored on rows in its data set's layout, without a hub."""
    suite = _short(built_in()[name])
    benchmarks = Benchmarks(suite, data=mirror, allow_code=True)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("['user' %}", "['user', 'system'] %}").replace(
        "== 'user'", "in ['user', 'system']"
    )
    tokenizer.model_max_length = 4096
    found = benchmarks.measure(_long_model(), tokenizer)
    assert list(found.items) == [task.task for task in suite.tasks]
    for task in suite.tasks:
        scores = found.items[task.task].scores
        assert all(0 <= score <= 1 for score in scores)
        assert len(scores) == (57 if task.task == "mmlu" else len(found.samples[task.task]))
        if task.shots:
            assert len(found.samples[task.task][0]["prompt"]) > 0
    if name == "alignment-tax":
        assert set(found.corpus) == {"wmt14-fr-en"}
        assert found.items["drop"].clusters == (0, 0)


def _short(suite: Suite) -> Suite:
    import dataclasses

    tasks = [dataclasses.replace(t, max_tokens=None if t.kind == "multiple-choice" else 3) for t in suite.tasks]
    return dataclasses.replace(suite, tasks=tuple(tasks))


def _long_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=4096, pad_token_id=0, eos_token_id=2, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _suite(text: str) -> Suite:
    return parse(f"suite: s\ntasks:\n  - {{{text}}}", "s.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("task: a, kind: exact, file: nowhere.jsonl", r"task a: .*nowhere.jsonl is not there: put it there"),
        ("task: a, kind: exact, file: bad.jsonl", r"neither JSON lines nor"),
        ("task: a, kind: exact, file: empty.jsonl", "holds no rows"),
        ("task: a, kind: math401, file: say.jsonl", r"row 1 has answer, prompt and lacks query, response: rename"),
        ("task: a, kind: math401, hub: nobody/nothing", r"nobody/nothing: cannot be loaded from the hub .*--data as"),
        ("task: gsm9k, harness: gsm8k", r"task gsm9k: lm-evaluation-harness has none of this name in gsm8k"),
        ("task: gsm8k, harness: nowhere.yaml", "nowhere.yaml is not there"),
        ("task: ifeval, harness: ifeval", r"IFEval: cannot be loaded from the hub|ifeval: needs \w+, which is not"),
        ("task: mbpp_plus, harness: mbpp", r"mbpp_plus: (cannot|needs)"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_says_how_to_mend_it(
    text: str, said: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    (folder / "bad.jsonl").write_text("{oops\n")
    (folder / "empty.jsonl").write_text("\n")
    monkeypatch.setattr(shutil, "which", lambda *_: None)
    with pytest.raises(DataError, match=said) as caught:
        Benchmarks(_suite(text), data=folder)
    assert "\n" not in str(caught.value)


def test_columns_can_be_renamed(folder: Path) -> None:
    suite = _suite("task: a, kind: math401, file: say.jsonl, columns: {query: prompt, response: answer}")
    assert Benchmarks(suite, data=folder, limit=2).fingerprint != Benchmarks(suite, data=folder, limit=3).fingerprint


def test_wrong_arguments(folder: Path, benchmarks: Benchmarks) -> None:
    with pytest.raises(ArgumentError, match="limit=0: give a positive number"):
        Benchmarks(benchmarks.suite, limit=0)
    with pytest.raises(ArgumentError, match=r"allow-code-execution=False: h of s run programs .* or skip them"):
        Benchmarks(_suite("task: h, kind: humaneval, file: h.jsonl"), data=folder)
    chatty = Benchmarks(parse((folder / "own.yaml").read_text() + "chat: true\n", "own"), data=folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    long = Benchmarks(_suite("task: a, kind: exact, file: say.jsonl, max_tokens: 64"), data=folder)
    with pytest.raises(ArgumentError, match=r"max_tokens of a=64: the model has room for 64 tokens"):
        long.measure(make_model().eval(), make_tokenizer())
    with pytest.raises(ArgumentError, match=r"chat-template=True: the tokenizer of .* has no chat template"):
        chatty.measure(make_model().eval(), tokenizer)


def test_metrics_of_several_values() -> None:
    sample = {
        "metrics": ["a", "b", "f"],
        "a": [True, False, True],
        "bleu": ("the cat sleeps here", ["the cat sleeps here"]),
        "f": (1, "x"),
    }
    assert item_score("t", "a", sample) == pytest.approx(2 / 3)
    assert item_score("t", "bleu", sample) == pytest.approx(1)
    with pytest.raises(DataError, match="task t: has no metric 'c': give one of a, b, f"):
        item_score("t", "c", sample)
    with pytest.raises(DataError, match=r"task t: metric 'f' gives .* choose one that is a number"):
        item_score("t", "f", sample)


def test_the_extra_is_named(benchmarks: Benchmarks, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtraError, match=r"lm_eval is not installed: pip install 'paretune\[eval\]'"):
        Benchmarks(benchmarks.suite)


def test_rows_are_kept_readable(benchmarks: Benchmarks) -> None:
    found = benchmarks.measure(make_model(seed=1).eval(), make_tokenizer())
    row = found.samples["say"][0]
    assert set(row) == {"item", "prompt", "target", "answer", "score"}
    assert json.dumps(found.samples)
