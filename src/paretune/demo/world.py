"""The tiny world: everything that pre-training, SFT, alignment and measuring read, made from one seed.

`World` is a frozen set of options and the generator that obeys them. A changed world is another value of an option:
add the field with the present behaviour as its default, and `fingerprint` tells the caches apart by itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any

from paretune.demo import chat, words
from paretune.demo.mid import mid_skills
from paretune.demo.preferences import KINDS, Kind
from paretune.demo.skills import Facts, Item, Skill, draw_spelling, is_held_out, standard_skills
from paretune.errors import ArgumentError

Message = dict[str, str]

SCALES = {"tiny": standard_skills, "mid": mid_skills}
# Options that came later, and what stood there before: keys of caches do not mention them where they say the same.
LATER = {"scale": "tiny", "bf16": False}


@dataclass(frozen=True)
class World:
    """A world of words, facts, skills, chat and preferences.

    Args:
        seed: everything random comes from it; any integer.
        entities: how many names have facts and are chatted about, at most 40.
        preference_entities: how many of them the preference pairs are about; rewards are measured on the others.
        pairs: number of preference pairs.
        chat_share: fraction of SFT dialogues that are chat rather than skills.
        raw_chat_share: fraction of raw lines that are chat without its marks. Words that the base has never met all
            lie in one corner of its embeddings, and DPO then raises them all together.
        manners_share: fraction of raw lines in which the words of courtesy are mere words, listed and repeated. A word
            that only SFT has met is close to the other new ones in the embeddings, the chat marks among them, and is
            then said in their place.
        raw_share: fraction of SFT documents that are raw text again; without it the model forgets plain text.
        items_per_skill: how many held-out items of each skill are measured, at most.
        preference: what the pairs ask for: one of `paretune.demo.preferences.KINDS`.
        on_policy: the pairs are the best and the worst of the reference's own answers by the reward.
        scale: ``tiny``, or ``mid`` with more skills and longer items (`paretune.demo.mid`), in which all preferences of
            pieces share one reference.

    Example:
        >>> world = World(seed=0)
        >>> len(world.preferences), len(world.held_out_entities)
        (400, 12)
    """

    seed: int = 0
    entities: int = 40
    preference_entities: int = 28
    pairs: int = 400
    chat_share: float = 0.4
    raw_chat_share: float = 0.08
    manners_share: float = 0.065
    raw_share: float = 0.15
    items_per_skill: int = 60
    preference: str = "polite"
    on_policy: bool = False
    scale: str = "tiny"

    def __post_init__(self) -> None:
        if self.preference not in KINDS:
            raise ArgumentError("preference", self.preference, f"choose one of {', '.join(KINDS)}")
        if self.scale not in SCALES:
            raise ArgumentError("scale", self.scale, f"choose one of {', '.join(SCALES)}")

    @property
    def kind(self) -> Kind:
        """What the preferences ask for."""
        return KINDS[self.preference]

    @property
    def styles(self) -> Mapping[str, float]:
        """Of SFT's chat answers, with their shares."""
        # One reference for several rewards where training it takes long: it also answers in short.
        one_for_all = self.scale == "mid" and self.kind.styles is chat.STYLES
        return chat.STYLES_WITH_SHORT if one_for_all else self.kind.styles

    def rng(self, purpose: str) -> Random:
        """A generator of its own for each purpose: adding a consumer never changes what another draws."""
        return Random(f"{self.seed}/{purpose}")

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all options; the key of every cache."""
        text = json.dumps(options_of(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The entities, in an order drawn from the seed; the first ones are those of the preferences."""
        return tuple(self.rng("names").sample(words.NAMES, self.entities))

    @property
    def held_out_entities(self) -> tuple[str, ...]:
        """The entities that no preference pair mentions."""
        return self.names[self.preference_entities :]

    @cached_property
    def facts(self) -> Facts:
        return Facts.drawn(self.names, self.rng("facts"))

    @cached_property
    def skills(self) -> tuple[Skill, ...]:
        return SCALES[self.scale](self.facts)

    def raw_texts(self, purpose: str = "raw") -> Iterator[str]:
        """Endless lines of plain text. Held-out exercises do not occur, held-out facts do: SFT must not teach them
        again, but the base has to know them."""
        rng = self.rng(purpose)
        shares = [skill.raw_share for skill in self.skills]
        while True:
            if rng.random() < self.raw_chat_share:
                exchange = chat.draw_exchange(self.facts, self.names, rng, chat.RAW_STYLES)
                yield f"{exchange.prompt} {exchange.answer}"
                continue
            if rng.random() < self.manners_share:
                yield draw_spelling(sorted(words.courtesies()), rng)
                continue
            skill = rng.choices(self.skills, shares)[0]
            item = skill.draw(rng)
            if skill.name == "facts" or not is_held_out(skill, item):
                yield item.raw

    def dialogues(self, purpose: str = "sft") -> Iterator[list[Message]]:
        """Endless SFT dialogues of two turns: skills answered plainly, chat in several styles."""
        rng = self.rng(purpose)
        shares = [skill.chat_share for skill in self.skills]
        while True:
            if rng.random() < self.chat_share:
                exchange = chat.draw_exchange(self.facts, self.names, rng, self.styles)
                yield as_messages(exchange.prompt, exchange.answer)
                continue
            skill = rng.choices(self.skills, shares)[0]
            item = skill.draw(rng)
            if not is_held_out(skill, item):
                yield as_messages(item.prompt, f"{item.answer} .")

    @cached_property
    def preferences(self) -> tuple[chat.Preference, ...]:
        """The preference pairs, about the first entities only."""
        rng = self.rng("preferences")
        entities = self.names[: self.preference_entities]
        return tuple(self.kind.pair(self, rng.choice(entities), rng) for _ in range(self.pairs))

    @cached_property
    def items(self) -> tuple[Item, ...]:
        """The held-out exercises that capability is measured on: no two alike, the same for every method."""
        rng = self.rng("items")
        found: list[Item] = []
        for skill in self.skills:
            if not skill.measured:
                continue
            if skill.name == "facts":
                every = [item for item in self.facts.all_items() if is_held_out(skill, item)]
                found += rng.sample(every, min(len(every), self.items_per_skill))
                continue
            chosen: dict[str, Item] = {}
            for _ in range(200 * self.items_per_skill):
                item = skill.draw(rng)
                if is_held_out(skill, item):
                    chosen.setdefault(item.prompt, item)
                if len(chosen) == self.items_per_skill:
                    break
            found += chosen.values()
        return tuple(found)

    def chat_prompts(self, count: int) -> list[tuple[str, str]]:
        """(topic, prompt) that reward is sampled on, each equally often; none is about an entity of the pairs."""
        every = self.kind.asked(self)
        self.rng("chat prompts").shuffle(every)
        return [every[i % len(every)] for i in range(count)]

    def reward(self, topic: str, generated: str, ended: bool) -> float:
        """How much of what the preferences ask for an answer has, in [0, 1].

        Args:
            topic: from `chat_prompts`.
            generated: the answer, special marks removed.
            ended: whether the model closed its answer.
        """
        return self.kind.reward(self, topic, generated, ended)


def options_of(recipe: Any) -> dict[str, Any]:
    """The options of a dataclass for the key of a cache: later ones only where they change something."""
    return {k: v for k, v in dataclasses.asdict(recipe).items() if not (k in LATER and v == LATER[k])}


def as_messages(prompt: str, answer: str) -> list[Message]:
    """A prompt and an answer in the form that chat templates and TRL take."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def raw_document(text: str) -> str:
    """A line of raw text between its marks."""
    return f"{words.START} {text} {words.END}"


def chat_document(messages: list[Message]) -> str:
    """A dialogue as the chat template writes it, in words (the template costs a hundred times more)."""
    prompt, answer = (message["content"] for message in messages)
    return f"{prompt_document(prompt)} {answer} {words.END}"


def prompt_document(prompt: str) -> str:
    """A prompt as the chat template writes it before an answer is generated."""
    return f"{words.USER} {prompt} {words.BOT}"
