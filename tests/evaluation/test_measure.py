"""Many points in one process: the command, its resumption, and that no two models are ever confused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from published_rows import write_jsonl
from tiny_models import CHAT_TEMPLATE, make_model, make_tokenizer, rows

from paretune.cli.main import main
from paretune.errors import ArgumentError, DataError
from paretune.evaluation.capability import Benchmarks
from paretune.evaluation.measure import Candidate, Rewarded, measure
from paretune.evaluation.points import ItemScores, Measurement, read_points
from paretune.evaluation.reward import Item
from paretune.evaluation.reward_sources import AnswersReward, read_pairs
from paretune.evaluation.suite import load

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SUITE = """
suite: small
tasks:
  - {task: say, kind: exact, file: say.jsonl, shots: 1, max_tokens: 3, category: talk}
  - {task: choose, kind: multiple-choice, file: choose.jsonl, category: choice}
"""
REWARD = "def words(prompts, completions, **_):\n    return [float(len(str(c).split())) for c in completions]\n"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A suite, prompts, pairs, a reward, and models that differ much: sft, aligned and base."""
    folder = tmp_path_factory.mktemp("measure")
    words = ["dog", "bird", "cat", "red", "blue", "green"]
    write_jsonl(folder / "say.jsonl", [{"prompt": f"the {a} sees", "answer": b} for a in words for b in words[:2]])
    choices = [
        {"question": f"the {a} {b}", "choices": ["x", "y"], "answer": i % 2} for i, a in enumerate(words) for b in words
    ]
    write_jsonl(folder / "choose.jsonl", choices)
    write_jsonl(folder / "prompts.jsonl", rows("grpo", 6))
    write_jsonl(folder / "pairs.jsonl", rows("dpo", 8))
    (folder / "suite.yaml").write_text(SUITE)
    (folder / "reward.py").write_text(REWARD)
    for name, seed in (("base", 1), ("sft", 2), ("aligned", 3)):
        make_model(seed=seed).save_pretrained(folder / name)
        tokenizer = make_tokenizer()
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.save_pretrained(folder / name)
    return folder


def command(here: Path, out: Path, *more: object) -> list[str]:
    given: list[object] = ["measure", "--reference", here / "sft", "--suite", here / "suite.yaml", "-o", out, "--quiet"]
    return [str(value) for value in [*given, *more]]


def answers(here: Path) -> list[object]:
    return ["--prompts", here / "prompts.jsonl", "--reward", f"{here / 'reward.py'}:words", "--max-new-tokens", 4]


class Length:
    """A reward that needs no model: the sum of one weight, so that it tells models apart."""

    relative = False

    def __init__(self) -> None:
        self.record: dict[str, Any] = {"source": "test"}

    def __call__(self, model: Any, tokenizer: Any, name: str) -> Rewarded:
        value = float(next(model.parameters()).detach().sum())
        return Rewarded(ItemScores.of([value, value + 1], "ab"))

    def prepare(self, model: Any, tokenizer: Any, name: str) -> None: ...


def opened(path: Path) -> Any:
    from paretune.generation import load as load_model

    return lambda: load_model(str(path))


def same(a: Measurement, b: Measurement) -> bool:
    return (a.capability_items, a.reward_items) == (b.capability_items, b.reward_items)


def test_checkpoints_against_the_reference(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "points.jsonl"
    arguments = command(here, out, here / "aligned", "--base", here / "base", "--items", tmp_path / "items", "--json")
    assert main([*arguments, *map(str, answers(here)), "--answers", str(tmp_path / "answers")]) == 0
    printed = json.loads(capsys.readouterr().out)
    points = {point.name: point for point in read_points(out)}
    assert [(p.name, p.family) for p in points.values()] == [
        ("sft", "reference"),
        ("base", "base"),
        ("aligned", "control"),
    ]
    assert [p["name"] for p in printed["points"]] == list(points)
    sft, aligned = points["sft"], points["aligned"]
    talk, choice = (aligned.capability_items[name].mean for name in ("say", "choose"))
    assert aligned.capability == pytest.approx((talk + choice) / 2)  # a macro-average over categories
    assert aligned.tax == pytest.approx(sft.capability - aligned.capability)
    assert aligned.tax_ci is not None
    assert aligned.tax_ci[0] <= aligned.tax <= aligned.tax_ci[1]
    assert set(aligned.by_benchmark) == {"say", "choose"}
    assert all(each.p_adjusted is not None for each in aligned.by_benchmark.values())
    assert aligned.measured["n"] == {"say": 12, "choose": 36}
    assert aligned.measured["prompts"] == sft.measured["prompts"]
    assert aligned.measured["model"] != sft.measured["model"]
    assert aligned.measured["reference"] == sft.measured["model"]
    assert aligned.measured["source"] == str(here / "aligned")
    assert aligned.measured["decoding"]["say"]["max_gen_toks"] == 3
    assert aligned.measured["reward"]["decoding"]["max_new_tokens"] == 4
    assert aligned.response_length is not None
    written = [json.loads(line) for line in (tmp_path / "items/aligned/say.jsonl").read_text().splitlines()]
    assert [row["score"] for row in written] == list(aligned.capability_items["say"].scores)
    assert sorted(p.name for p in (tmp_path / "answers").iterdir()) == ["aligned.jsonl", "base.jsonl", "sft.jsonl"]
    assert sft.kl == 0
    assert aligned.kl == pytest.approx(divergence_by_hand(here, tmp_path / "answers/aligned.jsonl"), rel=1e-4)
    assert main([*arguments[:-1], *map(str, answers(here)), "--no-kl"]) == 0
    assert "aligned: " in capsys.readouterr().out
    assert [point.kl for point in read_points(out)] == [None, None, None]


def divergence_by_hand(here: Path, file: Path) -> float:
    """The definition in double precision, an answer at a time."""
    from paretune.generation import load as load_model
    from paretune.generation import read_generations

    (policy, tokenizer), (reference, _) = (load_model(str(here / name)) for name in ("aligned", "sft"))
    found = []
    for answer in read_generations(file):
        start = tokenizer.apply_chat_template(answer.prompt, add_generation_prompt=True, return_dict=False)
        ids = [*start, *tokenizer(answer.text).input_ids, *([tokenizer.eos_token_id] if answer.finished else [])]
        with torch.no_grad():
            p, q = (m(torch.tensor([ids])).logits[0].double().log_softmax(-1) for m in (policy, reference))
        found.append(float((p.exp() * (p - q))[len(start) - 1 : len(ids) - 1].sum()))
    assert len({answer.tokens for answer in read_generations(file)}) > 1  # so padding was at work
    return sum(found) / len(found)


def test_a_dialled_reference_is_no_reference_for_kl(here: Path) -> None:
    """One object dialled in place would be compared with itself: KL 0 without a word."""
    from paretune.generation import Decoding
    from paretune.generation.prompts import read_questions

    opens = opened(here / "sft")
    model, tokenizer = opens()
    candidates = [Candidate(name, name, lambda: (model, tokenizer)) for name in ("sft", "dialled")]
    questions = read_questions(here / "prompts.jsonl", chat=True)
    source = AnswersReward(questions, Longer(), Decoding(3), "longer", progress=False)
    with pytest.raises(ArgumentError, match="model='dialled': is the reference's own model, changed in place"):
        measure(candidates, Benchmarks(load(str(here / "suite.yaml"))), source, progress=False)


def test_models_of_other_vocabularies_have_no_kl(here: Path) -> None:
    from paretune.generation import Decoding
    from paretune.generation.prompts import read_questions

    questions = read_questions(here / "prompts.jsonl", chat=True)
    source = AnswersReward(questions, Longer(), Decoding(3), "longer", progress=False)
    (sft, tokenizer), (aligned, more) = opened(here / "sft")(), opened(here / "aligned")()
    assert source(sft, tokenizer, "sft").kl == 0
    aligned.resize_token_embeddings(len(tokenizer) + 8)
    padded = source(aligned, more, "padded")
    assert (padded.kl, padded.about["kl"][:29]) == (None, "not measured: vocabularies of")
    more.add_tokens(["unheard"])
    other = source(aligned, more, "other")
    assert (other.kl, other.about["kl"]) == (None, "not measured: the reference has another vocabulary")


def test_an_edited_reward_or_template_is_another_one(here: Path, tmp_path: Path) -> None:
    """Taken over is only what was rewarded by the same function and read through the same template."""
    reward, model, out = tmp_path / "reward.py", tmp_path / "aligned", tmp_path / "points.jsonl"
    reward.write_text(REWARD)
    shutil.copytree(here / "aligned", model)
    full = command(here, out, model, "--prompts", here / "prompts.jsonl", "--reward", f"{reward}:words")
    full += ["--max-new-tokens", "4"]
    assert main(full) == 0
    before = read_points(out)
    reward.write_text(REWARD.replace("float(", "10 + float("))
    assert main(full) == 0
    assert [b.reward - a.reward for a, b in zip(before, read_points(out), strict=True)] == pytest.approx([10, 10])
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + "x")
    assert main(full) == 0
    assert read_points(out)[1].measured["key"] != before[1].measured["key"]


def test_ratios_of_one_loaded_model(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The ends are the checkpoints themselves, the middle is the merged checkpoint, each on the same items."""
    import paretune as pt

    middle = tmp_path / "middle"
    pt.merge("linear", {str(here / "sft"): 0.25, str(here / "aligned"): 0.75}, out=middle)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (here / "sft" / name).exists():
            shutil.copy(here / "sft" / name, middle)
    live = ["--pre", here / "sft", "--post", here / "aligned", "--ratios", "0,0.25,1"]
    assert main([*command(here, tmp_path / "live.jsonl", *live), *map(str, answers(here))]) == 0
    assert main([*command(here, tmp_path / "each.jsonl", here / "aligned", middle), *map(str, answers(here))]) == 0
    assert "capability is a" in capsys.readouterr().out
    dialled = {point.label: point for point in read_points(tmp_path / "live.jsonl")}
    loaded = {point.name: point for point in read_points(tmp_path / "each.jsonl")}
    for label, name in (("0", "aligned"), ("0.25", "middle"), ("1", "sft")):
        assert same(dialled[label], loaded[name])
        assert dialled[label].path == "aligned"
    assert not same(dialled["0"], dialled["1"])
    assert dialled["1"].tax == 0


def test_preferences(here: Path, tmp_path: Path) -> None:
    """The reference's own margins are 0; another model's are those of DPOMargin with the reference loaded beside it."""
    from paretune.evaluation.dpo_margin import DPOMargin
    from paretune.generation import load as load_model

    out = tmp_path / "points.jsonl"
    assert main(command(here, out, here / "aligned", "--preferences", here / "pairs.jsonl", "--beta", 0.2)) == 0
    sft, aligned = read_points(out)
    (policy, tokenizer), (reference, _) = (load_model(str(here / name)) for name in ("aligned", "sft"))
    margins = DPOMargin(policy, reference, tokenizer, beta=0.2)(read_pairs(str(here / "pairs.jsonl")))
    assert sft.reward_items is not None
    assert aligned.reward_items is not None
    assert set(sft.reward_items.scores) == {0}
    assert aligned.reward_items.scores == pytest.approx(margins, abs=1e-6)
    # The same name for another reference: the margins of an earlier run say nothing about it.
    again = command(here, out, here / "aligned", "--preferences", here / "pairs.jsonl", "--beta", 0.2)
    again[again.index("--reference") + 1] = f"sft={here / 'base'}"
    assert main(again) == 0
    (base, _) = load_model(str(here / "base"))
    wanted = DPOMargin(policy, base, tokenizer, beta=0.2)(read_pairs(str(here / "pairs.jsonl")))
    found = read_points(out)[1].reward_items
    assert found is not None
    assert found.scores == pytest.approx(wanted, abs=1e-6)
    assert found.scores != aligned.reward_items.scores
    second = tmp_path / "accuracy.jsonl"
    more = ["--preferences", here / "pairs.jsonl", "--reward", "dpo-accuracy"]
    assert main(command(here, second, here / "aligned", *more)) == 0
    sft, aligned = read_points(second)
    assert sft.reward == 0.5
    assert aligned.reward == pytest.approx(sum(m > 0 for m in margins if m is not None) / len(margins))


class Longer:
    """A pairwise reward: whether the answer is longer than the other one; fails on demand."""

    name, unit, pairwise = "longer", "win rate", True

    def __init__(self, failing: bool = False) -> None:
        self.failing, self.seen = failing, 0

    def __call__(self, items: Sequence[Item]) -> list[float | None]:
        self.seen += len(items)
        wins = [(len(i.answer) > len(i.other or "")) + 0.5 * (len(i.answer) == len(i.other or "")) for i in items]
        return [None if self.failing and n == 1 else float(win) for n, win in enumerate(wins)]

    def record(self) -> dict[str, Any]:
        return {"reward": "longer"}


def test_pairwise_rewards_meet_the_references_answers(here: Path, tmp_path: Path) -> None:
    from paretune.generation import Decoding, read_generations
    from paretune.generation.prompts import read_questions

    questions, decoding = read_questions(here / "prompts.jsonl", chat=True), Decoding(5, temperature=1.0, samples=3)
    benchmarks = Benchmarks(load(str(here / "suite.yaml")))
    candidates = [Candidate(n, n, opened(here / n)) for n in ("sft", "aligned")]

    def run(reward: Longer, folder: Path, known: Sequence[Measurement] = ()) -> list[Measurement]:
        source = AnswersReward(questions, reward, decoding, "longer", folder, progress=False)
        return measure(candidates, benchmarks, source, known=known, progress=False)

    reward = Longer()
    sft, aligned = run(reward, tmp_path)
    assert sft.reward_items is not None
    assert aligned.reward_items is not None
    assert set(sft.reward_items.scores) == {0.5}
    assert reward.seen == 18  # the reference is not asked about itself
    answers = {
        n: {(a.index, a.sample): len(a.text) for a in read_generations(tmp_path / f"{n}.jsonl")}
        for n in ("sft", "aligned")
    }
    wins = [(answers["aligned"][key] > n) + 0.5 * (answers["aligned"][key] == n) for key, n in answers["sft"].items()]
    assert aligned.reward == pytest.approx(sum(wins) / 18)
    assert aligned.reward_items.clusters == tuple(i // 3 for i in range(18))
    # the reference's point is known, its answers are needed all the same
    again = run(Longer(), tmp_path / "again", [sft])
    assert same(again[1], aligned)
    with pytest.raises(DataError, match="longer: 1 of 18 answers of aligned have no score"):
        run(Longer(failing=True), tmp_path / "failing")


def test_pairs_as_conversations(tmp_path: Path) -> None:
    user, good, bad = (
        {"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "good"), ("assistant", "bad"))
    )
    implicit = write_jsonl(tmp_path / "implicit.jsonl", [{"chosen": [user, good], "rejected": [user, bad]}])
    explicit = write_jsonl(tmp_path / "explicit.jsonl", [{"prompt": [user], "chosen": [good], "rejected": [bad]}])
    text = write_jsonl(tmp_path / "text.jsonl", [{"prompt": "q", "chosen": "good", "rejected": "bad"}])
    assert read_pairs(str(implicit)) == read_pairs(str(explicit)) == [Item([user], "good", "bad")]
    assert read_pairs(str(text)) == [Item("q", "good", "bad")]


def test_no_two_models_are_confused(here: Path, tmp_path: Path) -> None:
    """Taken over by content alone: a model that is overwritten in its folder is measured anew, an equal one is not."""
    model, benchmarks = tmp_path / "model", Benchmarks(load(str(here / "suite.yaml")))
    asked: list[str] = []

    def points(name: str, known: list[Measurement]) -> Measurement:
        candidates = [Candidate("sft", "reference", opened(here / "sft")), Candidate(name, "x", opened(model))]
        return measure(candidates, benchmarks, Length(), known=known, samples=lambda n, _: asked.append(n))[1]

    shutil.copytree(here / "aligned", model)
    first = points("a", [])
    again = points("b", [first])
    assert asked == ["sft", "a", "sft"]  # "b" has the same content
    assert same(first, again)
    shutil.copytree(here / "base", model, dirs_exist_ok=True)
    changed = points("a", [first])
    assert asked[3:] == ["sft", "a"]
    assert not same(first, changed)


def test_a_single_moved_weight_is_another_model(here: Path, tmp_path: Path) -> None:
    from paretune.generation import model_fingerprint

    model = make_model(seed=2)
    before = model_fingerprint(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    assert model_fingerprint(model) != before


def test_an_interrupted_run_goes_on(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "points.jsonl"
    full = command(here, out, here / "aligned", here / "base", *answers(here))
    plain, calls = Benchmarks.measure, []

    def failing(self: Benchmarks, *given: Any, **more: Any) -> Any:
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(self, *given, **more)

    monkeypatch.setattr(Benchmarks, "measure", failing)
    assert main(full) == 130
    assert [point.name for point in read_points(out)] == ["sft", "aligned"]
    assert main(full) == 0
    assert len(calls) == 4  # only the third one was left to do
    assert [point.name for point in read_points(out)] == ["sft", "aligned", "base"]
    fresh = tmp_path / "fresh.jsonl"
    monkeypatch.setattr(Benchmarks, "measure", plain)
    assert main(command(here, fresh, here / "aligned", here / "base", *answers(here))) == 0
    assert all(same(a, b) and a.tax_ci == b.tax_ci for a, b in zip(read_points(out), read_points(fresh), strict=True))


def test_a_run_that_goes_on_and_is_stopped_again_loses_nothing(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "points.jsonl"
    full = command(here, out, here / "aligned", here / "base", *answers(here))
    assert main(full) == 0
    before = read_points(out)
    from paretune.generation import load as plain

    def stopped(path: str, **more: Any) -> Any:
        if path == str(here / "aligned"):
            raise KeyboardInterrupt
        return plain(path, **more)

    with monkeypatch.context() as patch:
        patch.setattr("paretune.generation.load", stopped)
        assert main(full) == 130
        assert read_points(out) == before
        assert main([*full, "--limit", "3"]) == 130  # other items: the old points would not belong to the new
        assert [point.name for point in read_points(out)] == ["sft"]


@pytest.mark.parametrize(
    ("drop", "add", "said"),
    [
        ("--suite", [], "suite=None: give a suite; paretune measure --list-suites"),
        ("--suite", ["--suite", "nope"], "suite='nope': give one of alignment-tax, online-merging, tiny-world, xright"),
        ("--suite", ["--suite", "nope.yaml"], "nope.yaml: the suite cannot be read"),
        ("--suite", ["--suite", "tiny-world", "--data", "/nowhere"], "task sum: /nowhere/sum.jsonl is not there"),
        ("--suite", ["--suite", "online-merging"], "humaneval, mbpp, ds1000 of online-merging run programs"),
        ("--reference", [], "reference=None: give the model"),
        ("--reference", ["--reference", "/no/such/model"], "/no/such/model: there is no such model"),
        ("--reference", ["--reference", "HERE"], "holds no config.json: give the directory of a model"),
        ("", ["--beta", "0"], "beta=0.0: give a positive number"),
        ("-o", [], "out=None: name the file"),
        ("-o", ["-o", "/nowhere/points.jsonl"], "name a file in a directory that exists"),
        ("MODEL", [], "models=[]: give models to compare"),
        ("--preferences", [], "prompts=None: give --prompts FILE and --reward KIND:WHAT, or --preferences FILE"),
        ("--preferences", ["--preferences", "SUITE"], "neither JSON lines nor a JSON list"),
        ("--preferences", ["--preferences", "PROMPTS"], "row 1 has prompt; give prompt, chosen and rejected"),
        ("--preferences", ["--prompts", "PROMPTS", "--reward", "nothing"], "reward='nothing': write model:PATH"),
        ("", ["--reward", "model:x"], "preferences are scored by dpo-margin or dpo-accuracy"),
        ("", ["--device", "cuda"], "device='cuda': there is no GPU here"),
        ("", ["--device", "abacus"], "device='abacus': give cpu, cuda"),
        ("", ["--only", "nope"], "only='nope': give a task or category of small: choice, choose, say, talk"),
        ("", ["--skip", "talk,choice"], "nothing of small is left"),
        ("", ["--ratios", "0,1"], "pre=None: pre, post and ratios belong together"),
        ("", ["--limit", "0"], "limit=0: give a positive number"),
        ("", ["--sute", "x"], "did you mean --suite?"),
    ],
)  # fmt: skip
def test_wrong_use(
    drop: str, add: list[str], said: str, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """One line that names the argument and the mend, before a model is loaded."""
    if "cuda" in add and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr("paretune.generation.local.load", lambda *_, **__: pytest.fail("a model was loaded"))
    given = {
        "--reference": here / "sft", "--suite": here / "suite.yaml", "-o": tmp_path / "p.jsonl",
        "--preferences": here / "pairs.jsonl",
    }  # fmt: skip
    line: list[object] = ["measure"] if drop == "MODEL" else ["measure", here / "aligned"]
    for flag, value in given.items():
        line += [] if flag == drop else [flag, value]
    places = {"HERE": here, "SUITE": here / "suite.yaml", "PROMPTS": here / "prompts.jsonl"}
    line += [places.get(each, each) for each in add]
    assert main([str(each) for each in line]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("paretune: error: ")
    assert said in error


def test_what_cannot_work_is_said_before_the_benchmarks(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Benchmarks, "measure", lambda *_, **__: pytest.fail("the benchmarks ran"))
    given = answers(here)
    given[-1] = 512
    assert main(command(here, tmp_path / "p.jsonl", here / "aligned", *given)) == 2
    assert "max_new_tokens=512: prompt 0 has" in capsys.readouterr().err


def test_names_lead_nowhere(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither out of the folders that were named nor into the terminal."""
    items, folder = tmp_path / "items", tmp_path / "answers"
    hostile = ["..=" + str(here / "aligned"), f"a\x1b[2J\nb/../../c={here / 'base'}"]
    arguments = command(here, tmp_path / "p.jsonl", *hostile, *answers(here), "--items", items, "--answers", folder)
    assert main([each for each in arguments if each != "--quiet"]) == 0
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    assert {path.name for path in tmp_path.iterdir()} == {"p.jsonl", "items", "answers"}
    assert {path.name for path in items.iterdir()} == {"sft", "__", "a__2J_b_.._.._c"}
    assert len(list(folder.iterdir())) == 3


def test_other_points_are_not_overwritten(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "points.jsonl"
    out.write_text(json.dumps(Measurement("mine", "x", 0, (0, 0), 0, (0, 0)).to_dict()) + "\n")
    before = out.read_text()
    assert main(command(here, out, here / "aligned", "--preferences", here / "pairs.jsonl")) == 2
    assert "holds other points, such as 'mine': name another file" in capsys.readouterr().err
    assert out.read_text() == before


def test_the_listing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", "--list-suites"]) == 0
    text = capsys.readouterr().out
    for words in ("math23k", "lm-evaluation-harness", "never met", "greedy, 256 tokens", "shots"):
        assert words in text
    assert main(["measure", "--list-suites", "--json"]) == 0
    listing = json.loads(capsys.readouterr().out)
    categories = {task["category"] for task in listing["suites"]["online-merging"]}
    assert categories == {"math", "code", "instruction following", "reading", "knowledge", "agent", "code-switching"}
    assert listing["suites"]["xright"][0]["shots"] == 1
    assert {t["task"] for t in listing["suites"]["online-merging"] if t["runs_code"]} == {"humaneval", "mbpp", "ds1000"}
