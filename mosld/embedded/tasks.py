"""Six multiple-choice tasks whose labels ship with Python: no download, no data file.

category, bidi, width, decomposition, numeric: the text is a character's name, the label its entry in `unicodedata`.
kind: the text is the first sentence of a standard-library docstring, the label what it documents.

A prompt is "TEXT\\nquestion:"; the four choices are plain words. Each choice ends in a full stop, so that its
summed log-probability also says where the answer ends. Labels and texts follow the Unicode data and the library of
the running Python: accuracies from different Python versions are not comparable.

split="block"  Test characters come from other Unicode blocks than training characters, test docstrings from other
               source files.
split="name"   By the text alone. Easier: MATHEMATICAL BOLD CAPITAL A may be trained on and MATHEMATICAL ITALIC
               CAPITAL A tested.
"""

import re
import sysconfig
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable
from fractions import Fraction
from random import Random
from typing import NamedTuple

from ..tasks.examples import Example, Task
from .python_text import characters, docstrings, first_sentence, held_out

MIN_TRAIN, MIN_TEST = 16, 4  # a label rarer than this on either side is left out

CATEGORIES = {
    "Lu": "uppercase letter",
    "Ll": "lowercase letter",
    "Lt": "titlecase letter",
    "Lm": "modifier letter",
    "Lo": "other letter",
    "Mn": "nonspacing mark",
    "Mc": "spacing mark",
    "Me": "enclosing mark",
    "Nd": "decimal digit",
    "Nl": "letter number",
    "No": "other number",
    "Pc": "connector punctuation",
    "Pd": "dash punctuation",
    "Ps": "open punctuation",
    "Pe": "close punctuation",
    "Pi": "initial quote",
    "Pf": "final quote",
    "Po": "other punctuation",
    "Sm": "math symbol",
    "Sc": "currency symbol",
    "Sk": "modifier symbol",
    "So": "other symbol",
    "Zs": "space separator",
    "Cf": "format control",
}
DIRECTIONS = {
    "L": "left to right",
    "R": "right to left",
    "AL": "arabic letter",
    "EN": "european number",
    "ES": "european separator",
    "ET": "european terminator",
    "AN": "arabic number",
    "CS": "common separator",
    "NSM": "nonspacing mark",
    "BN": "boundary neutral",
    "WS": "white space",
    "ON": "other neutral",
}
WIDTHS = {"N": "neutral", "W": "wide", "A": "ambiguous", "Na": "narrow", "H": "halfwidth", "F": "fullwidth"}
TAGS = {"compat": "compatibility", "super": "superscript", "sub": "subscript", "noBreak": "no break"}


class Item(NamedTuple):
    """A text, its right answer and the block or file that the block split keeps on one side."""

    text: str
    label: str
    group: str


def docstring_items() -> list[Item]:
    """Sentences of 4 to 40 words; one that documents two kinds of thing, or stands in two files, is left out."""
    homes = defaultdict(set)
    for text, kind, file in docstrings():
        homes[first_sentence(text)].add((kind, file))
    items = []
    for text, home in homes.items():
        if len(home) == 1 and _is_plain_sentence(text):
            items.append(Item(text, *min(home)))
    return items


def _is_plain_sentence(text: str) -> bool:
    return 4 <= len(text.split()) <= 40 and text.isascii() and ">>>" not in text


def _decomposition(char: str) -> str:
    """The tag in angle brackets ("font"); "canonical" where there is none, "none" where nothing is decomposed."""
    mapping = unicodedata.decomposition(char)
    tag = re.match(r"<(\w+)>", mapping)
    if tag is None:
        return "canonical" if mapping else "none"
    return TAGS.get(tag.group(1), tag.group(1))


def _numeric(char: str) -> str | None:
    value = unicodedata.numeric(char, None)
    return None if value is None else str(Fraction(value).limit_denominator(1000))


QUESTIONS: dict[str, tuple[str, Callable[[str], str | None]]] = {
    "category": ("category", lambda char: CATEGORIES.get(unicodedata.category(char))),
    "bidi": ("direction", lambda char: DIRECTIONS.get(unicodedata.bidirectional(char))),
    "width": ("width", lambda char: WIDTHS.get(unicodedata.east_asian_width(char))),
    "decomposition": ("decomposition", _decomposition),
    "numeric": ("value", _numeric),
}


def _character_items(label: Callable[[str], str | None]) -> list[Item]:
    items = []
    for character in characters():
        value = label(character.char)
        if value is not None:
            items.append(Item(character.name, value, character.block))
    return items


def _round_robin(items: list[Item], count: int, rng: Random) -> list[Item]:
    """At most `count` items, one of each label in turn until a label runs out."""
    drawn = Counter()
    turns = []
    for item in rng.sample(items, len(items)):
        turns.append((drawn[item.label], item.label, item))
        drawn[item.label] += 1
    turns.sort()
    return [item for _, _, item in turns[:count]]


def _examples(items: list[Item], labels: list[str], question: str, rng: Random) -> list[Example]:
    """Each item with three wrong answers drawn from its task's labels."""
    examples = []
    for text, label, _ in rng.sample(items, len(items)):
        others = [other for other in labels if other != label]
        choices = [label, *rng.sample(others, 3)]
        rng.shuffle(choices)
        # The full stop is scored as well, and says that the answer ends there.
        words = [f"{choice}." for choice in choices]
        examples.append(Example.multiple_choice(f"{text}\n{question}:", words, choices.index(label)))
    return examples


def _task(name: str, question: str, items: list[Item], train: int, test: int, split: str) -> Task:
    """Splits the items, keeps the labels that both sides have, and draws."""
    sides: dict[bool, list[Item]] = {False: [], True: []}  # by whether it is held out
    for item in items:
        sides[held_out(item.group if split == "block" else item.text)].append(item)
    labels = _labels_of_both(sides[False], sides[True])
    if len(labels) < 4:
        raise RuntimeError(
            f"task {name!r} needs 4 labels on both sides of the {split} split, found {labels} in {len(items)} texts"
            f" (library sources: {sysconfig.get_path('stdlib')}, Unicode {unicodedata.unidata_version})"
        )
    drawn = []
    for side, count in ((False, train), (True, test)):
        rng = Random(f"{name}/{split}/{side}")  # of its own, so that the size of one side changes nothing on the other
        kept = [item for item in sides[side] if item.label in labels]
        drawn.append(_examples(_round_robin(kept, count, rng), labels, question, rng))
    return Task(name, *drawn)


def _labels_of_both(train: list[Item], test: list[Item]) -> list[str]:
    """The labels that are frequent enough on either side, in order."""
    in_train = Counter(item.label for item in train)
    in_test = Counter(item.label for item in test)
    frequent = []
    for label in sorted(in_train):
        if in_train[label] >= MIN_TRAIN and in_test[label] >= MIN_TEST:
            frequent.append(label)
    return frequent


def embedded_tasks(train: int = 1000, test: int = 250, split: str = "block") -> list[Task]:
    """category, bidi, width, decomposition, numeric and kind, at most `train` and `test` examples each.

    Labels are drawn in turn. Where a label or a whole task runs short there are fewer items of it, never a repeated
    one. The same split of blocks serves all tasks: a test name of one task is in no task's training examples.

    split: "block" or "name", see the top of this file.
    """
    if split not in ("block", "name"):
        raise ValueError(f'split must be "block" or "name", got {split!r}')
    tasks = []
    for name, (question, label) in QUESTIONS.items():
        tasks.append(_task(name, question, _character_items(label), train, test, split))
    tasks.append(_task("kind", "kind", docstring_items(), train, test, split))
    return tasks
