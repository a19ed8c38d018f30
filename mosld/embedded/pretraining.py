"""The text that the embedded base model is pre-trained on: the standard library about itself, without any label.

docstrings        except those that either split tests, and those that quote one of these
names             in runs of neighbouring code points
records           "NAME\\nlast word: x.": questions in the form of the tasks that a text answers by itself

Test names do occur. A label occurs only where it is a word of the name or of the prose.
The language reference of `help()` is not used: in a trial, more records in its place served the tasks better.
"""

import random

from .python_text import characters, docstrings, first_sentence, held_out

QUOTED_WORDS = 4  # a quoted test sentence is looked up by its first words; every test sentence has as many


def pretraining_text(records: int = 50_000, seed: int = 0) -> list[str]:
    """Documents in a fixed shuffled order, `records` of them questions about a name, half as many about a sentence."""
    prose = untested_docstrings()
    names = [character.name for character in characters()]
    rng = random.Random(seed)
    documents = prose + _runs(names)
    for name in rng.choices(names, k=records):
        documents.append(_record(name, rng))
    sentences = _sentences(prose)
    if sentences:  # a distribution may leave the library's sources out
        for sentence in rng.choices(sentences, k=records // 2):
            documents.append(_record(sentence, rng))
    return rng.sample(documents, len(documents))


def _runs(names: list[str]) -> list[str]:
    """Sixteen names of neighbouring code points in a document."""
    return ["\n".join(names[start : start + 16]) for start in range(0, len(names), 16)]


def _sentences(prose: list[str]) -> list[str]:
    """First sentences of the length that a task's texts have."""
    sentences = []
    for text in prose:
        sentence = first_sentence(text)
        if 4 <= len(sentence.split()) <= 40:
            sentences.append(sentence)
    return sentences


def untested_docstrings() -> list[str]:
    """Docstrings whose first sentence is on the training side of both splits, and that quote no tested one."""
    tested, kept = set(), []
    for docstring in docstrings():
        sentence = first_sentence(docstring.text)
        if held_out(docstring.file) or held_out(sentence):
            tested.add(sentence)
        else:
            kept.append(docstring.text)
    quotes = _Quotes(tested)
    return [text for text in kept if not quotes.found_in(text)]


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


def _record(text: str, rng: random.Random) -> str:
    """A question in the form of the tasks, answered by the text's own words, in lower case as the tasks' labels are."""
    words = text.lower().split()
    questions = {
        "first word": words[0],
        "last word": words[-1].rstrip("."),
        "longest word": max(words, key=len).rstrip("."),
        "word count": str(len(words)),
    }
    question, answer = rng.choice(list(questions.items()))
    return f"{text}\n{question}: {answer}."
