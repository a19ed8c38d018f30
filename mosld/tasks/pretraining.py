"""The text that the embedded base model is pre-trained on: the standard library about itself, without any label.

docstrings        except those that either split tests, and except paragraphs that quote one of these
help() topics     the language reference, by paragraph
names             in runs of neighbouring code points
records           "NAME\\nlast word: X.": questions in the form of the tasks that a name answers by itself

Test names do occur. A label occurs only where it is a word of the name or of the prose.
"""

import random
import re

from mosld.tasks.python_text import characters, docstrings, first_sentence, held_out

QUOTED_WORDS = 4  # a quoted test sentence is looked up by its first words; every test sentence has as many


def pretraining_text(records: int = 20_000, seed: int = 0) -> list[str]:
    """Documents in a fixed shuffled order. Docstrings that either split tests are left out, and their quotations."""
    documents = _plain_documents() + self_supervised_records(records, seed)
    return random.Random(seed).sample(documents, len(documents))


def _plain_documents() -> list[str]:
    """Docstrings, paragraphs of the language reference and runs of neighbouring names."""
    tested, kept = set(), []
    for docstring in docstrings():
        sentence = first_sentence(docstring.text)
        if held_out(docstring.module) or held_out(sentence):
            tested.add(sentence)
        else:
            kept.append(docstring.text)
    quotes = _Quotes(tested)
    prose = kept + [part for topic in _topics().values() for part in re.split(r"\n\s*\n", topic)]
    names = [character.name for character in characters()]
    runs = ["\n".join(names[start : start + 16]) for start in range(0, len(names), 16)]
    return [text for text in prose if len(text) >= 20 and not quotes.found_in(text)] + runs


class _Quotes:
    """Sentences of at least four words, found inside longer texts by their first four words."""

    def __init__(self, sentences: set[str]):
        self.by_start: dict[tuple[str, ...], list[list[str]]] = {}
        for words in map(str.split, sentences):
            if len(words) >= QUOTED_WORDS:
                self.by_start.setdefault(tuple(words[:QUOTED_WORDS]), []).append(words)

    def found_in(self, text: str) -> bool:
        words = text.split()
        for start in range(len(words) - QUOTED_WORDS + 1):
            for quote in self.by_start.get(tuple(words[start : start + QUOTED_WORDS]), ()):
                if words[start : start + len(quote)] == quote:
                    return True
        return False


def _topics() -> dict[str, str]:
    """The language reference of `help()`; some distributions leave it out, then the base does without."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    return topics


def self_supervised_records(count: int, seed: int) -> list[str]:
    """Questions in the form of the tasks, answered by the name's own words: they teach the model to read a prompt."""
    rng = random.Random(seed)
    names = [character.name for character in characters()]
    return [_record(name, rng) for name in rng.choices(names, k=count)]


def _record(name: str, rng: random.Random) -> str:
    words = name.split()
    questions = {
        "first word": words[0],
        "last word": words[-1],
        "longest word": max(words, key=len),
        "word count": str(len(words)),
    }
    question, answer = rng.choice(list(questions.items()))
    return f"{name}\n{question}: {answer}."
