"""Code-switching: whether an answer stays in the scripts of its language."""

from __future__ import annotations

import unicodedata
from collections import Counter

from ...errors import DataError
from .kind import Kind

# First words of Unicode names; Latin letters are allowed nowhere by default, but see LATIN_SHARE.
SCRIPTS = {
    "arabic": ("ARABIC",),
    "chinese": ("CJK",),
    "english": ("LATIN",),
    "french": ("LATIN",),
    "german": ("LATIN",),
    "hindi": ("DEVANAGARI",),
    "japanese": ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "HALFWIDTH", "IDEOGRAPHIC"),
    "korean": ("HANGUL",),
    "russian": ("CYRILLIC",),
    "spanish": ("LATIN",),
    "thai": ("THAI",),
}
SHARE = 0.05  # letters of other scripts that are no switch: a unit, a formula, a quoted word
LATIN_SHARE = 0.3  # names, brands and code are written in Latin letters everywhere


def scripts_of(text: str) -> Counter[str]:
    """How many letters of each script a text has.

    Example:
        >>> sorted(scripts_of("Hello 世界, привет!").items())
        [('CJK', 2), ('CYRILLIC', 6), ('LATIN', 5)]
    """
    letters = (letter for letter in text if letter.isalpha())
    return Counter((unicodedata.name(letter, "UNKNOWN").split() or ["UNKNOWN"])[0] for letter in letters)


def stays(text: str, language: str) -> float:
    """1 where an answer stays in its language's scripts, 0 where it switches or has no letters at all.

    It switches where letters of any other script are more than 5% of all, or Latin ones more than 30%.

    Raises:
        DataError: a language whose scripts are not known here.
    """
    allowed = SCRIPTS.get(language.lower())
    if allowed is None:
        raise DataError(f"language={language!r}: its scripts are not known; give one of {', '.join(sorted(SCRIPTS))}")
    counts = scripts_of(text)
    total = counts.total()
    if not total:
        return 0.0
    latin = counts["LATIN"] if "LATIN" not in allowed else 0
    other = total - latin - sum(counts[name] for name in allowed)
    return float(other <= SHARE * total and latin <= LATIN_SHARE * total)


KINDS = (
    Kind(
        name="code-switching",
        about="a question in some language; right where the answer stays in its scripts",
        columns=(("prompt", "language"),),
        prompt=lambda row: row["prompt"],
        target=lambda row: "",
        score=lambda row, text: stays(text, row["language"]),
        metric="stays",
        until=(),
        max_tokens=512,
        layout="ours: prompt, language",
    ),
)
