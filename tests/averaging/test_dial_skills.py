"""`paretune average dial` with a suite: skills in table, JSON and picture, for every policy of the reference."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import WORDS, make_model, make_tokenizer, write_rows

import paretune as pt
from paretune.averaging.dial import Agreement, Skills, dial
from paretune.averaging.dial_picture import draw_dial
from paretune.cli.main import main

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SUITE = """
suite: small
tasks:
  - {task: choose, kind: squad-f1, file: choose.jsonl, max_tokens: 6, category: choice}
  - {task: pick, kind: squad-f1, file: pick.jsonl, max_tokens: 6, category: other}
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``sft``; ``aligned``, its TIES merge ``merged``, and ``adapter`` as policies; a suite, prompts and a reward."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("dial")
    for name, seed in (("sft", 0), ("aligned", 1)):
        make_model(seed=seed).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    torch.manual_seed(5)
    config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(make_model(seed=0), config)
    for name, p in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(folder / "adapter")
    ends = {str(folder / "sft"): 0.4, str(folder / "aligned"): 0.6}
    pt.merge("ties", models=ends, base=str(folder / "sft"), out=str(folder / "merged"), density=0.7)
    rng = random.Random(0)
    for file in ("choose", "pick"):
        drawn = [(" ".join(rng.choices(WORDS, k=3)), " ".join(rng.sample(WORDS, 5))) for _ in range(20)]
        rows = [{"context": asked, "question": asked, "answers": {"text": [said]}} for asked, said in drawn]
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "suite.yaml").write_text(SUITE)
    write_rows(folder / "prompts.jsonl", "grpo", 4)
    (folder / "reward.py").write_text(
        "def words(completions, **_):\n    return [min(1.0, len(str(c)) / 100) for c in completions]\n"
    )
    return folder


def command(here: Path, post: str, *more: object) -> list[str]:
    given: list[object] = [
        "average", "dial", "--pre", here / "sft", "--post", post, "--prompts", here / "prompts.jsonl", "--reward",
        f"{here / 'reward.py'}:words", "--own", 4, "--max-new-tokens", 6, "--quiet", "--least-exact", 0,
        "--largest-kl", 100, *more,
    ]  # fmt: skip
    return [str(value) for value in given]


def capability(model: Any, folder: Path) -> float:
    """The suite's mean, asked of one model by itself."""
    from paretune.evaluation.capability import Benchmarks
    from paretune.evaluation.suite import load

    items = Benchmarks(load(str(folder / "suite.yaml"))).measure(model, make_tokenizer(), progress=False).items
    return sum(sum(each.scores) / len(each.scores) for each in items.values()) / len(items)


def opened(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path).eval()


@pytest.mark.parametrize("post", ["aligned", "merged", "adapter"])
def test_skills_of_any_policy(post: str, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from peft import PeftModel

    given = f"{here / 'sft'}+{here / 'adapter'}" if post == "adapter" else str(here / post)
    more = ["--suite", here / "suite.yaml", "--ladder", "1,1.5", "--plot", tmp_path / "dial.svg"]
    out = tmp_path / "dial.json"
    assert main(command(here, given, *more, "-o", out)) == 0
    shown = capsys.readouterr().out.splitlines()
    found = json.loads(out.read_text())
    whole = PeftModel.from_pretrained(opened(here / "sft"), here / "adapter") if post == "adapter" else None
    policy = opened(here / post) if whole is None else whole.merge_and_unload()
    at = {rung["scale"]: rung["skills"] for rung in [found["reference"], *found["rungs"]]}
    assert at[0.0]["mean"] == pytest.approx(capability(opened(here / "sft"), here))
    assert at[1.0]["mean"] == pytest.approx(capability(policy, here))
    assert at[0.0]["mean"] != at[1.0]["mean"]
    assert set(at[1.0]["by_category"]) == {"choice", "other"}
    assert at[1.0]["ci"][0] <= at[1.0]["mean"] <= at[1.0]["ci"][1]
    assert "skills" in shown[0]
    assert shown[1].endswith("(pre)")
    assert f"{at[1.5]['mean']:.3f} [" in shown[3]
    assert "<svg" in (tmp_path / "dial.svg").read_text()


def test_only_json_on_stdout(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--suite", here / "suite.yaml", "--only", "choice", "--suite-limit", 4, "--ladder", "0.5", "--json"]
    assert main(command(here, str(here / "aligned"), *more)) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["rungs"][0]["skills"]["by_category"]) == ["choice"]
    assert found["chosen"] == 0.5


def test_without_a_suite_there_are_no_skills(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(here, str(here / "aligned"), "--ladder", "0.5")) == 0
    shown = capsys.readouterr().out
    assert "skills" not in shown
    assert "(pre)" not in shown


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--suite", "nope"], "suite='nope'"),
        (["--skip", "choice"], "--skip='choice': is of a suite"),
        (["--suite-limit", "3"], "--suite-limit='3'"),
        (["--plot", "dial.gif"], "--plot='dial.gif'"),
        (["--plot", "/nowhere/dial.png"], "--plot="),
    ],
)
def test_refused(more: list[str], message: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(here, str(here / "aligned"), *more)) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_skills_never_decide() -> None:
    """The reference is measured once, before the climb; the choice is the one without skills."""
    scales: list[float] = []
    skills = {0.0: 0.9, 0.5: 0.8, 1.0: 0.1}
    rewards = {0.0: 0.1, 0.5: 0.4, 1.0: 0.9}

    def climb(**more: Any) -> Any:
        return dial(scales.append, lambda: [rewards[scales[-1]]] * 8, ladder=(0.5, 1.0), **more)

    plain = climb()
    scales.clear()
    found = climb(skills=lambda: Skills(skills[scales[-1]], (0.0, 1.0)), agreement=lambda: Agreement(0.9, 0.1))
    assert scales == [0.0, 0.5, 1.0]
    assert found.reference.skills.mean == 0.9
    assert [rung.skills.mean for rung in found.rungs] == [0.8, 0.1]
    assert (found.chosen, found.why) == (plain.chosen, plain.why)
    assert plain.reference is None
    panels = draw_dial(found).axes
    assert [axis.get_title().split(" (")[0] for axis in panels] == ["reward", "skills", "agreement with the reference"]
    assert panels[1].lines[0].get_ydata().tolist() == [0.9, 0.8, 0.1]
    assert len(draw_dial(plain).axes) == 1
