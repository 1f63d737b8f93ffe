"""The world of `paretune demo` as files: two models, exercises, prompts, pairs and a reward, for docs/measure.md.

    python examples/tiny_world/write.py runs/world [--seed 0]

The models come from the demo's cache; the first time they are trained, which takes about two CPU minutes.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from paretune.demo import words
from paretune.demo.pretrain import Recipe, prepare
from paretune.demo.world import World, as_messages

REWARD = '''\
"""The demo's reward: a greeting, a courtesy word, thanks, a closing and the topic count a fifth each."""

from paretune.demo.chat import reward
from paretune.demo.words import NAMES


def polite(prompts, completions, **_):
    asked = [prompt[-1]["content"].split() for prompt in prompts]
    topics = [next(word for word in question if word in NAMES) for question in asked]
    return [reward(topic, c[0]["content"], ended=True) for topic, c in zip(topics, completions, strict=True)]
'''


def write_exercises(world: World, out: Path) -> None:
    """The held-out exercises, one file a skill, with the words that scoring passes over."""
    ignore = sorted(words.manners())
    by_skill: dict[str, list[dict[str, Any]]] = {}
    for item in world.items:
        by_skill.setdefault(item.category, []).append({"prompt": item.prompt, "answer": item.answer, "ignore": ignore})
    for skill, rows in by_skill.items():
        write(out / f"{skill}.jsonl", rows)


def write_chat(world: World, out: Path) -> None:
    """Prompts about entities that no pair mentions, pairs about the others, and the reward."""
    asked = dict.fromkeys(prompt for _, prompt in world.chat_prompts(200))
    write(out / "prompts.jsonl", [{"prompt": [{"role": "user", "content": prompt}]} for prompt in asked])
    pairs = []
    for pair in world.preferences:
        chosen, rejected = (as_messages(pair.prompt, answer) for answer in (pair.chosen, pair.rejected))
        pairs.append({"prompt": chosen[:1], "chosen": chosen[1:], "rejected": rejected[1:]})
    write(out / "pairs.jsonl", pairs)
    (out / "reward.py").write_text(REWARD)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    world = World(seed=arguments.seed)
    write_exercises(world, arguments.out)
    write_chat(world, arguments.out)
    for name, source in zip(("base", "reference"), prepare(Recipe(world)), strict=True):
        shutil.copytree(source, arguments.out / name, dirs_exist_ok=True)
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
