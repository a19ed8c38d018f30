"""Regular expressions from configurations, which PEFT matches with the names of layers: only those that end in time.

Python's `re` tries one way after the other: `(a+)+` has 2 to the power of n ways through n letters. Here the ways are
counted on the parsed expression before it is used. What repeats may hold no repetition and no choice, and the ways
through the whole are at most MAX_WAYS, where an open repetition such as `.*` counts WAYS, `a?` two, and `a|b` the sum
of its sides.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

try:
    from re import _constants as c  # pyright: ignore[reportAttributeAccessIssue]  their home from Python 3.11 on
    from re import _parser as parser  # pyright: ignore[reportAttributeAccessIssue]
except ImportError:
    import sre_constants as c
    import sre_parse as parser

WAYS = 30
# Five times `.*` in a layer's name take a tenth of a second, six a second.
MAX_WAYS = 200_000_000
# Characters. All layers of a large model, each by its whole name, are some ten thousands.
MAX_LENGTH = 100_000
# PEFT's fields whose value is one expression; where its entries are a list, `re` gets them as well.
EXPRESSIONS = (
    "target_modules", "target_parameters", "exclude_modules", "layers_pattern", "modules_to_save",
    "feedforward_modules",
)  # fmt: skip
LISTS = ("layers_pattern", "modules_to_save", "feedforward_modules")
# Ends the names of the fields that map an expression to a number.
PATTERNS = "_pattern"
REPEATS = (c.MAX_REPEAT, c.MIN_REPEAT, getattr(c, "POSSESSIVE_REPEAT", None))  # the last from Python 3.11 on


def check_expression(name: str, pattern: Any, inside: str = "{}") -> None:
    """raises ValueError where `pattern` is no regular expression, or one whose match may take for ever.

    name: of the setting, for the message. inside: the expression that PEFT puts `pattern` into, in the place of {}; it
    must be an expression too.
    """
    try:
        if not isinstance(pattern, str):
            raise TypeError(f"it is {type(pattern).__name__}")
        if len(pattern) > MAX_LENGTH:
            raise ValueError(f"it has {len(pattern)} characters, more than {MAX_LENGTH}")
        re.compile(inside.replace("{}", pattern))
        ways = _ways(parser.parse(pattern))
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{name} has {pattern!r}, which is no regular expression: {error}") from error
    except ValueError as error:
        raise ValueError(f"{name} has {pattern!r:.200}, which may take for ever: {error}") from error
    if ways > MAX_WAYS:
        raise ValueError(
            f"{name} has {pattern!r:.200}, which may take for ever: there are more than {MAX_WAYS} ways through it"
        )


def check_expressions(fields: Mapping[str, Any], path: Path) -> None:
    """raises ValueError for an expression among the `fields` of the configuration at `path` that is refused.

    The configuration may be any method's. `check_expression` refuses.
    """
    for name, pattern in _expressions(fields):
        try:
            check_expression(name, pattern)
        except ValueError as error:
            raise ValueError(f"{path} cannot be used: {error}") from error


def _expressions(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """-> a field's name and an expression in it"""
    for name in EXPRESSIONS:
        if isinstance(fields.get(name), str):
            yield name, fields[name]
    for name, value in fields.items():
        if name in LISTS and isinstance(value, list) or name.endswith(PATTERNS) and isinstance(value, dict):
            for pattern in value:
                yield name, pattern


def _ways(sequence: Any) -> int:
    """How many ways there are through a parsed expression; raises ValueError for a repetition in a repetition."""
    ways = 1
    for kind, value in sequence:
        ways *= _ways_of(kind, value)
    return ways


def _ways_of(kind: Any, value: Any) -> int:
    if kind in REPEATS:
        least, most, repeated = value
        inner = _ways(repeated)
        if most <= 1:
            return inner + most - least
        if inner > 1:
            raise ValueError("what it repeats holds a repetition or a choice itself")
        if not repeated.getwidth()[0]:
            raise ValueError("what it repeats may be empty")
        return int(min(most - least + 1, WAYS))
    if kind is c.BRANCH:
        return sum(_ways(side) for side in value[1])
    if kind is c.GROUPREF:
        # What a back reference stands for has any length. Two ways keep it from being repeated.
        return 2
    if kind is c.GROUPREF_EXISTS:
        _, yes, no = value
        return _ways(yes) + (_ways(no) if no else 1)
    inside = value if isinstance(value, tuple) else (value,)  # of groups, lookaheads and what else holds an expression
    ways = 1
    for part in inside:
        if isinstance(part, parser.SubPattern):
            ways *= _ways(part)
    return ways
