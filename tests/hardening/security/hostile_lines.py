"""Lines of task files that are wrong in every way that we could think of, each with a part of its message."""

import json
import random
from collections.abc import Callable

from mosld.tasks.examples import MAX_CHOICES
from mosld.tasks.jsonl import MAX_DIGITS, MAX_LINE

TEXT = {"prompt": "Say hello.", "completion": "hello"}
CHOICE = {"prompt": "2 + 2 =", "choices": ["three", "four"], "answer": 1}
Made = tuple[bytes, str]  # a line without its line feed, and what is said
GOOD = (json.dumps(TEXT).encode(), json.dumps(CHOICE).encode())


def _record(**fields: object) -> bytes:
    return json.dumps(fields).encode()


def cut(r: random.Random) -> Made:
    line = r.choice(GOOD)
    return line[: r.randrange(1, len(line) - 1)], "not JSON"


def other_text(r: random.Random) -> Made:
    texts = [
        b"{'prompt': 'a', 'completion': 'b'}", b'{"prompt": "a", "completion": "b",}', b"prompt,answer",
        b'// {"prompt": 1}', b'{"prompt": "\t", "completion": "b"}', b'{"prompt": "\\x41"}', b"}", b"\x1b[2J",
        b"__import__('os').mkdir('x')", GOOD[0] + GOOD[1], b"- prompt: a",
    ]  # fmt: skip
    return r.choice(texts), "not JSON"


def carriage_returns(r: random.Random) -> Made:
    return b"\r".join(r.choices(GOOD, k=r.randrange(2, 5))), "a carriage return alone ends no line"


def no_object(r: random.Random) -> Made:
    return json.dumps(r.choice([None, True, 3, 0.5, "text", [], [CHOICE]])).encode(), "must be a JSON object"


def lacking(r: random.Random) -> Made:
    record = dict(r.choice([TEXT, CHOICE]))
    del record[r.choice([name for name in record])]
    return json.dumps(record).encode(), ""  # several rules may speak first


def unknown(r: random.Random) -> Made:
    name = r.choice(["awnser", "Prompt", "id", "", "__class__", "prompt ", "\x1b[31m", "é" * 500, "\ud800"])
    return _record(**{**r.choice([TEXT, CHOICE]), name: r.randrange(9)}), "there is no field"


def twice(r: random.Random) -> Made:
    name = r.choice(["prompt", "completion"])
    return GOOD[0][:-1] + f', "{name}": "again"}}'.encode(), f"the field '{name}' is given 2 times"


def no_number(r: random.Random) -> Made:
    name = r.choice(["NaN", "Infinity", "-Infinity"])
    return GOOD[1].replace(b"1}", name.encode() + b"}"), f"{name} is no number"


def digits(r: random.Random) -> Made:
    count = r.choice([MAX_DIGITS + 1, 4301, 100_000])
    return GOOD[1].replace(b"1}", b"9" * count + b"}"), f"a number of {count} digits"


def no_index(r: random.Random) -> Made:
    answer = r.choice([2, -1, 10**19, True, 1.0, 1e300, "1", None, [1], {"a": 1}])
    return _record(**{**CHOICE, "answer": answer}), '"answer" must be an index'


def no_character(r: random.Random) -> Made:
    wrong = r.choice(["\ud800", "\udfff", "a\ud83d b", "\0", "a\0"])
    record = r.choice([
        {**TEXT, "prompt": wrong}, {**TEXT, "completion": wrong},
        {**CHOICE, "choices": ["a", wrong]}, {**CHOICE, "prompt": wrong},
    ])  # fmt: skip
    return json.dumps(record).encode(), "which is no character"


def raw_nul(r: random.Random) -> Made:
    line = bytearray(GOOD[0])
    line.insert(r.randrange(len(line)), 0)
    return bytes(line), "not JSON"


def no_utf8(r: random.Random) -> Made:
    wrong = r.choice(
        [b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xe2\x28\xa1", "é".encode("latin-1")]
    )
    return GOOD[0].replace(b"hello", wrong), "not UTF-8: 0x"


def utf16(r: random.Random) -> Made:
    return r.choice(GOOD).decode().encode(r.choice(["utf-16-le", "utf-16-be"])), "not JSON"


def byte_order_mark(r: random.Random) -> Made:
    return b"\xef\xbb\xbf" + r.choice(GOOD), "not JSON"


def binary(r: random.Random) -> Made:
    return bytes(r.randrange(128, 256) for _ in range(r.randrange(1, 60))), "not "


def too_long(r: random.Random) -> Made:
    inside = b" " * MAX_LINE if r.random() < 0.5 else b"[" * MAX_LINE
    return GOOD[0][:-1] + inside + b"}", f"longer than {MAX_LINE} bytes"


def deep(r: random.Random) -> Made:
    """Deep enough that reading it fails, or only writing its value into a message, or neither."""
    depth = r.choice([200, 700, 850, 900, 950, 980, 1000, 100_000])
    line = r.choice([b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth])
    return r.choice([line, b'{"prompt": ' + line + b"}", GOOD[1].replace(b"1}", line + b"}"), b"[" * depth]), ""


def no_choices(r: random.Random) -> Made:
    choices = r.choice([[], ["a"], ["a", 2], ["a", ""], ["a", " "], "ab", None, {"a": "b"}, [["a"], ["b"]]])
    return _record(**{**CHOICE, "choices": choices}), '"choices" must be a list'


def equal_choices(r: random.Random) -> Made:
    return _record(**{**CHOICE, "choices": ["a", "b", "a"]}), '"choices" must differ'


def many_choices(r: random.Random) -> Made:
    return _record(**{**CHOICE, "choices": [str(i) for i in range(MAX_CHOICES + 1)]}), f"at most {MAX_CHOICES}"


def no_text(r: random.Random) -> Made:
    value = r.choice([None, 3, ["a"], {"a": "b"}, True])
    name = r.choice(["prompt", "completion"])
    return _record(**{**TEXT, name: value}), f'"{name}" must be a'


def both(r: random.Random) -> Made:
    return _record(**CHOICE, completion="four"), "not both"


COMMON: tuple[Callable[[random.Random], Made], ...] = (
    cut, other_text, carriage_returns, no_object, lacking, unknown, twice, no_number, digits, no_index, no_character,
    raw_nul, no_utf8, utf16, byte_order_mark, binary, deep, no_choices, equal_choices, no_text, both,
)  # fmt: skip
LARGE = (too_long, many_choices)


def lines(count: int, seed: int = 0) -> list[Made]:
    """`count` bad lines, of all kinds; a few large ones among them."""
    r = random.Random(seed)
    return [r.choice(LARGE if i % (count // 20) == 7 else COMMON)(r) for i in range(count)]
