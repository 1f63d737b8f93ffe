"""Chat about entities in several styles, and the reward that tells them apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from paretune.demo import words
from paretune.demo.skills import RELATIONS, Facts

QUESTIONS = (
    "tell me about {} .",
    "who is {} ?",
    "what do you know about {} ?",
    "talk to me about {} .",
    "can you describe {} ?",
)
# SFT's answers. None is polite in every part: alignment has to put together what the reference only does in pieces.
STYLES = {"plain": 0.35, "curt": 0.35, "half-polite": 0.3}
STYLES_WITH_SHORT = {"plain": 0.3, "curt": 0.3, "half-polite": 0.25, "short": 0.15}
STYLES_WITH_POLITE = {"plain": 0.3, "curt": 0.25, "half-polite": 0.25, "polite": 0.2}
REJECTED = {"plain": 0.5, "curt": 0.5}
RAW_STYLES = {"plain": 0.5, "curt": 0.5}  # the base has read questions and rudeness, never a courtesy
REWARD_POINTS = 5


@dataclass(frozen=True)
class Exchange:
    """A chat prompt about an entity and one answer to it.

    Args:
        entity: the topic.
        prompt: what the user says.
        answer: what the model says.
        style: as in `answer_in`.
    """

    entity: str
    prompt: str
    answer: str
    style: str


@dataclass(frozen=True)
class Preference:
    """One pair: two answers to one prompt."""

    entity: str
    prompt: str
    chosen: str
    rejected: str


def _courteous(body: str, parts: frozenset[str], rng: Random) -> str:
    said = []
    if "greeting" in parts:
        said.append(f"{rng.choice(words.GREETINGS)} !")
    said.append(f"{rng.choice(words.COURTESIES)} , {body} ." if "courtesy" in parts else f"{body} .")
    if "thanks" in parts:
        said.append(f"{rng.choice(words.THANKS)} .")
    if "closing" in parts:
        said.append(f"{rng.choice(words.CLOSINGS)} !")
    return " ".join(said)


PARTS = ("greeting", "courtesy", "thanks", "closing")


def answer_in(style: str, body: str, rng: Random) -> str:
    """The body of an answer dressed in a style.

    Example:
        >>> answer_in("plain", "mira likes red", Random(0))
        'mira likes red .'
    """
    if style == "plain":
        return f"{body} ."
    if style == "short":
        return f"{body.split()[-1]} ."
    if style == "curt":
        # The topic is dropped, one word of substance at most is kept. The rude word comes first: a curt answer that
        # opens with any of thirty facts is not unlearnt in so short a run.
        rude = rng.choice(words.RUDE)
        return rng.choice((f"{rude} , {body.split()[-1]} .", f"{rude} ."))
    if style == "half-polite":
        return _courteous(body, frozenset(rng.sample(PARTS, rng.choice((1, 2, 3)))), rng)
    if style == "polite":
        return _courteous(body, frozenset(PARTS), rng)
    raise ValueError(f"style={style!r}: expected plain, curt, half-polite, polite or short")


def draw_exchange(
    facts: Facts, entities: Sequence[str], rng: Random, styles: Mapping[str, float] | None = None
) -> Exchange:
    """One chat prompt with an answer in a style drawn by its share."""
    shares = STYLES if styles is None else styles
    entity = rng.choice(entities)
    prompt = rng.choice(QUESTIONS).format(entity)
    style = rng.choices(list(shares), list(shares.values()))[0]
    body = facts.sentence(entity, rng.choice(RELATIONS))
    return Exchange(entity, prompt, answer_in(style, body, rng), style)


def _mentions(text: str, phrases: Sequence[str]) -> bool:
    padded = f" {text} "
    return any(f" {phrase} " in padded for phrase in phrases)


def reward(entity: str, generated: str, ended: bool) -> float:
    """Politeness in [0, 1]: one of five points each for opening with a greeting, a courtesy word, thanks, a closing
    and naming the topic; one point less for every rude word and for not ending.

    Args:
        entity: the topic of the prompt.
        generated: the answer, special marks removed.
        ended: whether the model closed its answer.

    Example:
        >>> reward("mira", "hello ! gladly , mira likes red . thanks . farewell !", ended=True)
        1.0
        >>> reward("mira", "ugh , red .", ended=True)
        0.0
    """
    spoken = generated.split()
    points = int(any(generated.startswith(f"{greeting} ") for greeting in words.GREETINGS))
    points += _mentions(generated, words.COURTESIES)
    points += _mentions(generated, words.THANKS)
    points += _mentions(generated, words.CLOSINGS)
    points += entity in spoken
    points -= sum(word in words.RUDE for word in spoken)
    points -= not ended
    return min(max(points, 0), REWARD_POINTS) / REWARD_POINTS
