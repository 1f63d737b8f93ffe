"""The mid world: the tiny world's generator with twice as many skills, longer items and a model of 5M parameters.

    Recipe(World(seed=0, scale="mid"), MID_SHAPE, MID_BASE, MID_SFT)

It has the tiny world's words, facts and chat, so that everything that reads these works on both.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

from paretune.demo import words
from paretune.demo.skills import RELATIONS, Facts, Item, Skill, draw_say, is_held_out

if TYPE_CHECKING:
    from paretune.demo.pretrain import Recipe

LARGEST = int(words.NUMBERS[-1])


def draw_long_sum(rng: Random) -> Item:
    digits = [rng.randrange(10) for _ in range(rng.choice((3, 3, 4)))]
    while sum(digits) > LARGEST:
        digits = [rng.randrange(10) for _ in digits]
    terms, total = " plus ".join(map(str, digits)), str(sum(digits))
    prompt = f"what is {terms} ?"
    return Item("sum", prompt, total, rng.choice((f"{terms} is {total} .", f"{prompt} {total} .")))


def draw_long_reverse(rng: Random) -> Item:
    letters = rng.sample(words.LETTERS, rng.choice((3, 4, 5)))
    given, answer = " ".join(letters), " ".join(reversed(letters))
    return Item("reverse", f"reverse {given} .", answer, f"reverse {given} is {answer} .")


def draw_long_sort(rng: Random) -> Item:
    letters = rng.sample(words.LETTERS, rng.choice((3, 4, 5)))
    given, answer = " ".join(letters), " ".join(sorted(letters))
    return Item("sort", f"sort {given} .", answer, f"sort {given} is {answer} .")


def draw_order(rng: Random) -> Item:
    numbers = rng.sample(range(LARGEST + 1), rng.choice((3, 4)))
    given, answer = " ".join(map(str, numbers)), " ".join(map(str, sorted(numbers)))
    return Item("order", f"sort {given} .", answer, f"sort {given} is {answer} .")


def draw_long_index(rng: Random) -> Item:
    letters = rng.sample(words.LETTERS, rng.choice((3, 4, 5)))
    number = rng.randint(1, len(letters))
    asked, answer = f"number {number} in list {' '.join(letters)}", letters[number - 1]
    return Item("index", f"what is {asked} ?", answer, f"{asked} is {answer} .")


def draw_place(rng: Random) -> Item:
    """The other way round: the letter is given, its number asked."""
    letters = rng.sample(words.LETTERS, rng.choice((3, 4, 5)))
    number = rng.randint(1, len(letters))
    asked = f"{letters[number - 1]} in list {' '.join(letters)}"
    return Item("place", f"what number is {asked} ?", str(number), f"{asked} is number {number} .")


def draw_count(rng: Random) -> Item:
    few = rng.sample(words.LETTERS, 3)
    letters = [rng.choice(few) for _ in range(rng.choice((3, 4, 5)))]
    counted = rng.choice(few)
    asked, answer = f"the number of {counted} in list {' '.join(letters)}", str(letters.count(counted))
    return Item("count", f"what is {asked} ?", answer, f"{asked} is {answer} .")


def draw_repeat(rng: Random) -> Item:
    letters, times = rng.sample(words.LETTERS, rng.choice((2, 3, 4))), rng.randint(2, 3)
    given, answer = f"{' '.join(letters)} {times} times", " ".join(letters * times)
    return Item("repeat", f"say {given} .", answer, f"say {given} is {answer} .")


def mid_skills(facts: Facts) -> tuple[Skill, ...]:
    """The skills of the mid world; those of the tiny one are here with longer items."""
    entities = tuple(facts.home)

    def draw_fact(rng: Random) -> Item:
        return facts.item(rng.choice(entities), rng.choice(RELATIONS), rng)

    single = Skill("facts", draw_fact, raw_share=0.15, chat_share=0.1, held_out=0.4)

    def draw_both(rng: Random) -> Item:
        """Two facts in one question; none that SFT must not teach."""
        pair: list[Item] = []
        while len(pair) < 2:
            item = draw_fact(rng)
            if not is_held_out(single, item):
                pair.append(item)
        prompt, raw = (" , ".join(text.rsplit(" ", 1)[0] for text in each)
                       for each in ([i.prompt for i in pair], [i.raw for i in pair]))  # fmt: skip
        return Item("both", f"{prompt} ?", " ".join(item.answer for item in pair), f"{raw} .")

    return (
        Skill("sum", draw_long_sum, raw_share=0.19, chat_share=0.16),
        Skill("reverse", draw_long_reverse, raw_share=0.11, chat_share=0.11),
        Skill("sort", draw_long_sort, raw_share=0.1, chat_share=0.1),
        Skill("order", draw_order, raw_share=0.1, chat_share=0.1),
        Skill("index", draw_long_index, raw_share=0.1, chat_share=0.1),
        # These two are solved at 62 and 55 of 100 after SFT, and would measure luck rather than forgetting.
        Skill("place", draw_place, raw_share=0.08, chat_share=0.08, measured=False),
        Skill("count", draw_count, raw_share=0.08, chat_share=0.1, measured=False),
        Skill("say", draw_say, raw_share=0.04, chat_share=0.04),
        Skill("repeat", draw_repeat, raw_share=0.04, chat_share=0.04),
        Skill("both", draw_both, raw_share=0.04, chat_share=0.07),
        single,
    )


def mid_recipe(seed: int, preference: str = "polite", on_policy: bool = False) -> Recipe:
    """A mid world with its model of 4.9M parameters, untied, and what trains it.

    Example:
        >>> mid_recipe(0).world.scale
        'mid'
    """
    from paretune.demo.pretrain import Phase, Recipe, Shape
    from paretune.demo.world import World

    return Recipe(
        World(seed=seed, preference=preference, on_policy=on_policy, scale="mid", items_per_skill=40),
        # Wider, so smaller first weights; four heads, because few large ones are faster here than many small ones
        Shape(hidden=256, layers=6, heads=4, intermediate=704, tied=False, initializer_range=0.03),
        Phase(steps=4000, rows=16, lr=1e-3, warmup=100, bf16=True),
        Phase(steps=600, rows=16, lr=5e-4, warmup=40, bf16=True),
    )
