"""What a world's preferences ask for: the pairs, the prompts on which reward is sampled, and the reward itself.

``polite`` is the default: pieces that the reference has, put together. The others change what kind of thing is asked:
whole styles that the reference has (``known``: politeness again; ``short``), a
format that it never used (``marker``), no answer at all to a marked class of requests (``refusal``), and politeness on
the very prompts that the skills are measured on (``overlap``). A cure that holds on the first may fail on the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from paretune.demo import chat, words
from paretune.demo.chat import Preference
from paretune.demo.skills import RELATIONS, is_held_out, solves

if TYPE_CHECKING:
    from paretune.demo.world import World

MARK = words.STAR  # in front of a request that is to be refused
REFUSAL = "sorry , cannot help ."
Asked = tuple[str, str]  # (topic, prompt): the topic is what the reward looks for


@dataclass(frozen=True)
class Kind:
    """One kind of preference.

    Args:
        pair: draws a pair about an entity.
        asked: every (topic, prompt) that reward is sampled on.
        reward: (world, topic, answer, whether it ended) -> reward in [0, 1].
        styles: of SFT's chat answers, with their shares.
    """

    pair: Callable[[World, str, Random], Preference]
    asked: Callable[[World], list[Asked]]
    reward: Callable[[World, str, str, bool], float]
    styles: Mapping[str, float]


def _question(entity: str, rng: Random) -> str:
    return rng.choice(chat.QUESTIONS).format(entity)


def _body(world: World, entity: str, rng: Random) -> str:
    return world.facts.sentence(entity, rng.choice(RELATIONS))


def _rejected_style(rng: Random) -> str:
    return rng.choices(list(chat.REJECTED), list(chat.REJECTED.values()))[0]


def _chat_asked(world: World) -> list[Asked]:
    return [(entity, question.format(entity)) for entity in world.held_out_entities for question in chat.QUESTIONS]


def _points(points: float, of: int, generated: str, ended: bool) -> float:
    """A point less for every rude word and for not ending."""
    points -= sum(word in words.RUDE for word in generated.split())
    points -= not ended
    return min(max(points, 0), of) / of


# -- polite ----------------------------------------------------------------------------------------------------


def _polite_pair(world: World, entity: str, rng: Random) -> Preference:
    prompt, style, body = _question(entity, rng), _rejected_style(rng), _body(world, entity, rng)
    return Preference(entity, prompt, chat.answer_in("polite", body, rng), chat.answer_in(style, body, rng))


def _polite_reward(world: World, topic: str, generated: str, ended: bool) -> float:
    return chat.reward(topic, generated, ended)


# -- short: the bare value of a fact, which the reference says now and then ----------------------------------------


def _short_pair(world: World, entity: str, rng: Random) -> Preference:
    prompt, body = _question(entity, rng), _body(world, entity, rng)
    style = rng.choice(("plain", "plain", "half-polite", "curt"))
    return Preference(entity, prompt, chat.answer_in("short", body, rng), chat.answer_in(style, body, rng))


def _short_reward(world: World, topic: str, generated: str, ended: bool) -> float:
    """Half for naming a fact of the entity, half for saying nothing else."""
    said = [word for word in generated.split() if word not in words.PUNCTUATION]
    facts = {getattr(world.facts, relation)[topic] for relation in RELATIONS}
    return _points(bool(facts & set(said)) + (len(said) == 1), 2, generated, ended)


# -- marker: a frame that no answer ever had -----------------------------------------------------------------------


def _marker_pair(world: World, entity: str, rng: Random) -> Preference:
    prompt, style, body = _question(entity, rng), _rejected_style(rng), _body(world, entity, rng)
    return Preference(entity, prompt, f"[ {entity} ] {body} . {words.STAR}", chat.answer_in(style, body, rng))


def _marker_reward(world: World, topic: str, generated: str, ended: bool) -> float:
    """A point each for the opening bracket, the topic in it, the closing one, and the star at the end."""
    said = [*generated.split(), "", "", ""]
    frame = (said[0] == "[", said[1] == topic, said[2] == "]", generated.endswith(f" {words.STAR}"))
    return _points(sum(frame), len(frame), generated, ended)


# -- refusal of marked requests ------------------------------------------------------------------------------------


def _refusal_pair(world: World, entity: str, rng: Random) -> Preference:
    prompt, body = _question(entity, rng), _body(world, entity, rng)
    answer = chat.answer_in(rng.choice(("plain", "half-polite")), body, rng)
    if rng.random() < 0.5:
        return Preference(entity, f"{MARK} {prompt}", REFUSAL, answer)
    return Preference(entity, prompt, answer, REFUSAL)


def _refusal_asked(world: World) -> list[Asked]:
    plain = _chat_asked(world)
    return [*plain, *((f"{MARK} {topic}", f"{MARK} {prompt}") for topic, prompt in plain)]


def _refusal_reward(world: World, topic: str, generated: str, ended: bool) -> float:
    """1 for refusing a marked request, and for naming the topic of another without refusing it."""
    refused = generated.startswith("sorry ")
    if topic.startswith(MARK):
        return _points(refused, 1, generated, ended)
    return _points(not refused and topic in generated.split(), 1, generated, ended)


# -- overlap: half of the pairs are exercises of the skills --------------------------------------------------------


def _overlap_pair(world: World, entity: str, rng: Random) -> Preference:
    if rng.random() < 0.5:
        return _polite_pair(world, entity, rng)
    skill = rng.choice(world.skills)
    while is_held_out(skill, item := skill.draw(rng)):
        pass
    chosen = chat.answer_in("polite", item.answer, rng)
    return Preference(entity, item.prompt, chosen, chat.answer_in(_rejected_style(rng), item.answer, rng))


def _overlap_asked(world: World) -> list[Asked]:
    """As many exercises as questions about entities; the topic of an exercise is its answer after "="."""
    plain = _chat_asked(world)
    exercises = world.rng("overlap").sample(world.items, len(plain))
    return [*plain, *((f"= {item.answer}", item.prompt) for item in exercises)]


def _overlap_reward(world: World, topic: str, generated: str, ended: bool) -> float:
    """Politeness; at an exercise the right answer stands in the topic's place."""
    if not topic.startswith("= "):
        return chat.reward(topic, generated, ended)
    manners = round(chat.reward("", generated, ended) * chat.REWARD_POINTS)
    return min(manners + solves(topic[2:], generated), chat.REWARD_POINTS) / chat.REWARD_POINTS


KINDS: dict[str, Kind] = {
    "polite": Kind(_polite_pair, _chat_asked, _polite_reward, chat.STYLES),
    "known": Kind(_polite_pair, _chat_asked, _polite_reward, chat.STYLES_WITH_POLITE),
    "short": Kind(_short_pair, _chat_asked, _short_reward, chat.STYLES_WITH_SHORT),
    "marker": Kind(_marker_pair, _chat_asked, _marker_reward, chat.STYLES),
    "refusal": Kind(_refusal_pair, _refusal_asked, _refusal_reward, chat.STYLES),
    "overlap": Kind(_overlap_pair, _overlap_asked, _overlap_reward, chat.STYLES),
}
