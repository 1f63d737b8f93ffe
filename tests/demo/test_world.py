"""The tiny world: one seed makes one world, nothing held out is taught, answers and rewards are what they claim."""

from __future__ import annotations

from itertools import islice
from random import Random

import pytest

from paretune.demo import chat, words
from paretune.demo.skills import is_held_out, solves
from paretune.demo.world import World, as_messages, chat_document, prompt_document, raw_document

MANY = 4000


@pytest.fixture(scope="module")
def world() -> World:
    return World(seed=3)


def test_one_seed_makes_one_world(world: World) -> None:
    again, other = World(seed=3), World(seed=4)
    assert again.fingerprint == world.fingerprint != other.fingerprint
    assert again.preferences == world.preferences != other.preferences
    assert again.items == world.items
    assert list(islice(again.raw_texts(), 50)) == list(islice(world.raw_texts(), 50))
    assert list(islice(again.dialogues(), 50)) != list(islice(other.dialogues(), 50))


def test_an_option_changes_only_what_it_is_about(world: World) -> None:
    more = World(seed=3, pairs=500)
    assert more.preferences[:400] == world.preferences
    assert more.facts == world.facts
    assert list(islice(more.dialogues(), 50)) == list(islice(world.dialogues(), 50))


def test_every_word_is_in_the_vocabulary(world: World) -> None:
    known = set(words.vocabulary())
    documents = [raw_document(text) for text in islice(world.raw_texts(), MANY)]
    documents += [chat_document(dialogue) for dialogue in islice(world.dialogues(), MANY)]
    documents += [f"{p.prompt} {p.chosen} {p.rejected}" for p in world.preferences]
    documents += [f"{item.prompt} {item.answer}" for item in world.items]
    assert {word for document in documents for word in document.split()} <= known


def test_held_out_exercises_are_never_taught(world: World) -> None:
    asked = {item.prompt: item for item in world.items}
    taught = {dialogue[0]["content"] for dialogue in islice(world.dialogues(), MANY)}
    assert not taught & set(asked)
    # Facts are read by the base, in other words; all other held-out answers are in no text at all.
    read = set(islice(world.raw_texts(), MANY)) | set(islice(world.raw_texts("sft raw"), MANY))
    assert not read & {item.raw for item in world.items if item.category != "facts"}
    assert not any(prompt in text for text in read for prompt in asked if asked[prompt].category == "sum")


def test_the_base_reads_every_fact(world: World) -> None:
    read = set(islice(world.raw_texts(), 3 * MANY))
    missing = [item for item in world.facts.all_items() if not any(_tells(text, item.answer, item) for text in read)]
    assert not missing


def _tells(text: str, answer: str, item: object) -> bool:
    entity = next(word for word in item.prompt.split() if word in words.NAMES)  # type: ignore[attr-defined]
    return answer in text.split() and entity in text.split()


def test_two_in_five_facts_are_held_out(world: World) -> None:
    skill = next(skill for skill in world.skills if skill.name == "facts")
    held = [item for item in world.facts.all_items() if is_held_out(skill, item)]
    assert len(world.facts.all_items()) == 120
    assert 30 <= len(held) <= 66  # 48 expected, binomial


def test_items_are_distinct_and_balanced(world: World) -> None:
    assert len({item.prompt for item in world.items}) == len(world.items)
    counts = {skill.name: sum(item.category == skill.name for item in world.items) for skill in world.skills}
    assert all(count == world.items_per_skill for name, count in counts.items() if name not in ("facts", "say"))
    assert min(counts.values()) >= 30


@pytest.mark.parametrize("name", ["sum", "reverse", "sort", "index", "say"])
def test_answers_are_right(world: World, name: str) -> None:
    draw = next(skill.draw for skill in world.skills if skill.name == name)
    rng = Random(0)
    for _ in range(200):
        item = draw(rng)
        said = item.prompt.split()
        letters = [word for word in said if word in words.LETTERS]
        expected = {
            "sum": lambda said=said: [str(sum(int(word) for word in said if word.isdigit()))],
            "reverse": lambda letters=letters: letters[::-1],
            "sort": lambda letters=letters: sorted(letters),
            "index": lambda said=said, letters=letters: [letters[int(said[3]) - 1]],
            "say": lambda said=said: [said[1]] * int(said[2]),
        }[name]()
        assert [word for word in item.answer.split() if word not in ("[", "]", "*")] == expected
        assert item.answer.split()[-1] in item.raw.split()


def test_preferences_leave_the_measured_entities_out(world: World) -> None:
    about = {pair.entity for pair in world.preferences}
    assert len(world.held_out_entities) == 12
    assert not about & set(world.held_out_entities)
    assert {entity for entity, _ in world.chat_prompts(200)} == set(world.held_out_entities)


def test_chosen_is_rewarded_more_than_rejected(world: World) -> None:
    for pair in world.preferences:
        assert chat.reward(pair.entity, pair.chosen, ended=True) == 1.0
        assert chat.reward(pair.entity, pair.rejected, ended=True) <= 0.8
    rejected = {chat.reward(pair.entity, pair.rejected, ended=True) for pair in world.preferences}
    assert rejected == {0.0, 0.2}  # curt and plain


@pytest.mark.parametrize(
    ("generated", "ended", "points"),
    [
        ("hello ! gladly , the job of mira is baker . thank you . goodbye !", True, 5),
        ("hello ! gladly , the job of mira is baker . thank you . goodbye !", False, 4),
        ("gladly , the job of mira is baker . thank you . goodbye ! hello !", True, 4),  # greets, but not to open
        ("hello ! gladly , the job of oskar is baker . thanks . farewell !", True, 4),
        ("ugh , mira .", True, 0),
        ("whatever , boring .", False, 0),
        ("", True, 0),
        ("thank mira .", True, 1),  # half of a phrase is no phrase
    ],
)
def test_reward(generated: str, ended: bool, points: int) -> None:
    assert chat.reward("mira", generated, ended) == points / 5


def test_scoring_looks_past_manners() -> None:
    assert solves("1 2", "hello ! gladly , 1 2 . thank you . goodbye !")
    assert solves("[ dog dog ]", "ugh , [ dog dog ] .")
    assert not solves("1 2", "2 1 .")
    assert not solves("1 2", "1 2 <user>")
    assert not solves("1", "")


def test_an_unknown_style_is_named() -> None:
    with pytest.raises(ValueError, match="style='rude'"):
        chat.answer_in("rude", "mira", Random(0))


def test_tokenizer_writes_documents_as_the_template_does(world: World) -> None:
    tokenizer = words.build_tokenizer()
    assert len(tokenizer) == len(words.vocabulary())
    for pair in world.preferences[:20]:
        messages = as_messages(pair.prompt, pair.chosen)
        whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert whole == tokenizer(chat_document(messages))["input_ids"]
        prompt = tokenizer.apply_chat_template(
            messages[:1], tokenize=True, add_generation_prompt=True, return_dict=False
        )
        assert prompt == tokenizer(prompt_document(pair.prompt))["input_ids"] == whole[: len(prompt)]
        assert tokenizer.decode(whole[len(prompt) : -1]) == pair.chosen
        assert tokenizer.unk_token_id not in whole


def test_template_marks_what_the_assistant_says(world: World) -> None:
    tokenizer = words.build_tokenizer()
    messages = as_messages("who is mira ?", "mira likes red .")
    encoded = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    spoken = [i for i, said in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if said]
    assert tokenizer.decode(spoken) == "mira likes red . </s>"
