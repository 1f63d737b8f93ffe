"""What the tiny world's model can do before it is aligned: skills with checkable answers, each also as raw text.

A prompt is held out by a hash of its own text, so the split needs no list and no two processes can disagree on it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from paretune.demo import words

RELATIONS = ("home", "colour", "job")


@dataclass(frozen=True)
class Item:
    """One exercise.

    Args:
        category: the skill's name.
        prompt: what the user asks.
        answer: the words that count, without courtesies.
        raw: the same knowledge as a line of plain text, for pre-training.
    """

    category: str
    prompt: str
    answer: str
    raw: str


@dataclass(frozen=True)
class Skill:
    """A family of exercises.

    Args:
        name: the category under which it is scored.
        draw: makes one exercise.
        raw_share: its weight among the lines of raw text.
        chat_share: its weight among the skill dialogues of SFT.
        held_out: fraction of its prompts that SFT never sees.
        measured: part of the capability; what a model hardly learns says nothing of forgetting.
    """

    name: str
    draw: Callable[[Random], Item]
    raw_share: float
    chat_share: float
    held_out: float = 0.2
    measured: bool = True


def fraction_of(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big") / 2**48


def draw_sum(rng: Random) -> Item:
    digits = [rng.randrange(10) for _ in range(3)]
    terms, total = " plus ".join(map(str, digits)), str(sum(digits))
    prompt = f"what is {terms} ?"
    return Item("sum", prompt, total, rng.choice((f"{terms} is {total} .", f"{prompt} {total} .")))


def draw_reverse(rng: Random) -> Item:
    letters = rng.sample(words.LETTERS, rng.choice((3, 4)))
    given, answer = " ".join(letters), " ".join(reversed(letters))
    return Item("reverse", f"reverse {given} .", answer, f"reverse {given} is {answer} .")


def draw_sort(rng: Random) -> Item:
    letters = rng.sample(words.LETTERS, rng.choice((3, 4)))
    given, answer = " ".join(letters), " ".join(sorted(letters))
    return Item("sort", f"sort {given} .", answer, f"sort {given} is {answer} .")


def draw_index(rng: Random) -> Item:
    # Three letters, named after the number: a fourth, or the number last, is often not learnt at this size.
    letters = rng.sample(words.LETTERS, 3)
    number = rng.randint(1, 3)
    asked, answer = f"number {number} in list {' '.join(letters)}", letters[number - 1]
    return Item("index", f"what is {asked} ?", answer, f"{asked} is {answer} .")


def draw_say(rng: Random) -> Item:
    word = rng.choice((*words.THINGS, *words.COLOURS, *words.NAMES))
    times, starred = rng.randint(2, 4), rng.random() < 0.5
    left, right = (words.STAR, words.STAR) if starred else words.BRACKETS
    answer = " ".join([left, *([word] * times), right])
    where = f"{word} {times} times in {'stars' if starred else 'brackets'}"
    return Item("say", f"say {where} .", answer, f"say {where} is {answer} .")


def draw_spelling(known: Sequence[str], rng: Random) -> str:
    """A line of plain text in which words are copied, whatever they mean."""
    if rng.random() < 0.5:
        listed, number = rng.sample(known, 3), rng.randint(1, 3)
        return f"number {number} in list {' '.join(listed)} is {listed[number - 1]} ."
    word, times = rng.choice(known), rng.randint(2, 4)
    return f"say {word} {times} times in brackets is [ {' '.join([word] * times)} ] ."


@dataclass(frozen=True)
class Facts:
    """Three facts about each entity, drawn once from a world's seed."""

    home: dict[str, str]
    colour: dict[str, str]
    job: dict[str, str]

    @classmethod
    def drawn(cls, entities: Sequence[str], rng: Random) -> Facts:
        """Every value is used equally often, so that no guess does better than another."""

        def spread(values: Sequence[str]) -> dict[str, str]:
            pool = [values[i % len(values)] for i in range(len(entities))]
            rng.shuffle(pool)
            return dict(zip(entities, pool, strict=True))

        return cls(spread(words.TOWNS), spread(words.COLOURS), spread(words.JOBS))

    def item(self, entity: str, relation: str, rng: Random) -> Item:
        """The question about one fact; the raw form varies, the question and its answer do not."""
        value = getattr(self, relation)[entity]
        prompt, raws = {
            "home": (
                f"where does {entity} live ?",
                (
                    f"{entity} lives in {value} .",
                    f"the home of {entity} is {value} .",
                    f"{value} is where {entity} does live .",
                ),
            ),
            "colour": (
                f"which colour does {entity} like ?",
                (
                    f"{entity} likes {value} .",
                    f"the favourite colour of {entity} is {value} .",
                    f"{value} is which colour {entity} does like .",
                ),
            ),
            "job": (
                f"what is the work of {entity} ?",
                (
                    f"{entity} works as {value} .",
                    f"the job of {entity} is {value} .",
                    f"{value} is the work of {entity} .",
                ),
            ),
        }[relation]
        return Item("facts", prompt, value, rng.choice(raws))

    def sentence(self, entity: str, relation: str) -> str:
        """One fact as the body of a chat answer, without a full stop."""
        # Not the name first: DPO would push names down at the start of an answer, and soon everywhere.
        value = getattr(self, relation)[entity]
        subject = {"home": "home", "colour": "favourite colour", "job": "job"}[relation]
        return f"the {subject} of {entity} is {value}"

    def all_items(self) -> list[Item]:
        """Every question once, in a fixed order."""
        rng = Random(0)
        return [self.item(entity, relation, rng) for entity in self.home for relation in RELATIONS]


def standard_skills(facts: Facts) -> tuple[Skill, ...]:
    """The skills of the recipe; the shares give hard ones more room."""
    entities = tuple(facts.home)

    def draw_fact(rng: Random) -> Item:
        return facts.item(rng.choice(entities), rng.choice(RELATIONS), rng)

    return (
        Skill("sum", draw_sum, raw_share=0.28, chat_share=0.24),
        Skill("reverse", draw_reverse, raw_share=0.18, chat_share=0.20),
        Skill("sort", draw_sort, raw_share=0.14, chat_share=0.16),
        Skill("index", draw_index, raw_share=0.16, chat_share=0.20),
        Skill("say", draw_say, raw_share=0.06, chat_share=0.06),
        Skill("facts", draw_fact, raw_share=0.18, chat_share=0.14, held_out=0.4),
    )


def is_held_out(skill: Skill, item: Item) -> bool:
    """Whether SFT leaves this item out."""
    return fraction_of(item.prompt) < skill.held_out


def solves(answer: str, generated: str) -> bool:
    """Whether the generated words, without courtesies, rude words and punctuation, are exactly the answer.

    Example:
        >>> solves("1 2", "hello ! gladly , 1 2 . thank you .")
        True
        >>> solves("1 2", "1 2 3 .")
        False
    """
    removed = words.manners()
    return [w for w in generated.split() if w not in removed] == answer.split()
