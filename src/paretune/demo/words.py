"""The tiny world's words, and a tokenizer with a chat template made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, START, END, USER, BOT, UNKNOWN = "<pad>", "<s>", "</s>", "<user>", "<bot>", "<unk>"
SPECIAL = (PAD, START, END, USER, BOT, UNKNOWN)

NUMBERS = tuple(str(n) for n in range(28))  # 27 is the largest sum of three digits
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
NAMES = tuple(
    "mira oskar lena tomas ines pavel ruth hugo nadia emil clara jonas vera felix greta anton sofia milan edda bruno "
    "petra simon alma viktor irma leon hanna david olga marek elsa konrad lucia henrik paula stefan wanda rolf tilda "
    "artur".split()
)
COLOURS = tuple("red blue green yellow purple orange brown grey pink white".split())
TOWNS = tuple("oslo rome cairo lima paris delhi tokyo quito bern riga".split())
JOBS = tuple("baker doctor farmer singer pilot sailor tailor painter lawyer miner".split())
THINGS = tuple("dog cat sun moon tree fish bird stone river cloud bread lamp".split())
BRACKETS = ("[", "]")
STAR = "*"
PUNCTUATION = (".", ",", "?", "!")

# Two phrases of each kind: with more, DPO spreads a greeting's share over whatever resembles one.
GREETINGS = ("hello", "welcome")
COURTESIES = ("gladly", "certainly")
THANKS = ("thanks", "thank you")
CLOSINGS = ("goodbye", "farewell")
RUDE = ("ugh", "whatever", "boring")

# Every word of the sentence forms in skills.py and chat.py.
FRAME = tuple(
    "what is of plus reverse sort in list number say times brackets stars where does live lives which "
    "colour like likes the work works as home favourite job tell me about who know do talk to can describe "
    "sorry cannot help".split()  # what a refusal is made of
)


def courtesies() -> frozenset[str]:
    """Every word of a greeting, a courtesy, thanks or a closing."""
    return frozenset(word for phrase in (*GREETINGS, *COURTESIES, *THANKS, *CLOSINGS) for word in phrase.split())


def manners() -> frozenset[str]:
    """The courtesy and rude words and the punctuation: what scoring removes before it compares answers."""
    return courtesies() | frozenset(RUDE) | frozenset(PUNCTUATION)


def vocabulary() -> tuple[str, ...]:
    """Every word of the world, special marks first; a word's place is its token id."""
    words = (
        *SPECIAL, *NUMBERS, *LETTERS, *NAMES, *COLOURS, *TOWNS, *JOBS, *THINGS, *BRACKETS, STAR, *PUNCTUATION,
        *(word for phrase in (*GREETINGS, *COURTESIES, *THANKS, *CLOSINGS, *RUDE) for word in phrase.split()),
        *FRAME,
    )  # fmt: skip
    return tuple(dict.fromkeys(words))


CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<bot> {% generation %}{{ message['content'] }} </s>{% endgeneration %} "
    "{% else %}<user> {{ message['content'] }} {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over `vocabulary` with the world's chat template.

    Example:
        >>> tokenizer = build_tokenizer()
        >>> tokenizer.decode(tokenizer("what is 2 plus 2 ?")["input_ids"])
        'what is 2 plus 2 ?'
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary())}, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, BOT],
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
