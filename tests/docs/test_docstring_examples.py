"""Every public name has an example in its docstring, and the example computes what it says."""

import doctest
import inspect
import re
import types
from collections.abc import Iterator
from typing import NamedTuple

import pytest

import mosld
import mosld.merging
import mosld_kernels
from mosld import mixture

PACKAGES = (mosld_kernels, mosld, mosld.merging)
OURS = ("mosld", "mosld_kernels")


class Public(NamedTuple):
    name: str  # as one reads it: mosld.MoSLDLinear.from_linear
    docs: str

    @property
    def called(self) -> str:
        """What a use of it looks like."""
        last = self.name.rpartition(".")[2]
        return r"\w+\(" if last == "forward" else rf"\b{last}\b"


def public_names(packages) -> list[Public]:
    """What the packages list in __all__, what modules among it define, and the methods of classes."""
    found = []
    for package in packages:
        for name in package.__all__:
            found += _of(package, name)
    return found


def _of(package: types.ModuleType, name: str) -> Iterator[Public]:
    value, full = getattr(package, name), f"{package.__name__}.{name}"
    if inspect.ismodule(value):
        yield Public(full, value.__doc__ or "")
        for own_name, own in vars(value).items():
            is_defined_there = getattr(own, "__module__", None) == value.__name__
            if is_defined_there and not own_name.startswith("_"):
                yield from _of(value, own_name)
    elif inspect.isclass(value):
        yield Public(full, value.__doc__ or "")
        for method, own in vars(value).items():
            function = own.fget if isinstance(own, property) else inspect.unwrap(getattr(own, "__func__", own))
            public = inspect.isfunction(function) and not method.startswith("_")
            if public and (function.__doc__ or not _inherited(value, method)):
                yield Public(f"{full}.{method}", function.__doc__ or "")
    elif callable(value):
        yield Public(full, value.__doc__ or "")
    else:  # a table has no docstring of its own
        yield Public(full, package.__doc__ or "")


def _inherited(cls: type, method: str) -> bool:
    """Whether it is another library's method, which that library documents.

    A mixin's may be that of what it is mixed into.
    """
    mixed = [own for own in vars(mosld).values() if inspect.isclass(own) and issubclass(own, cls)]
    for own in mixed or [cls]:
        for base in own.__mro__:
            is_ours = base.__module__.partition(".")[0] in OURS
            if not is_ours and hasattr(base, method):
                return True
    return False


PUBLIC = public_names(PACKAGES)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Examples write into the folder they are in, one registers a mixing and one a router."""
    monkeypatch.chdir(tmp_path)
    mixings, routers = dict(mixture.MIXINGS), dict(mixture.ROUTERS)
    yield
    for registry, known in ((mixture.MIXINGS, mixings), (mixture.ROUTERS, routers)):
        registry.clear()
        registry.update(known)


@pytest.mark.parametrize("public", PUBLIC, ids=lambda public: public.name)
def test_the_example_of_a_public_name_computes_what_it_says(public, elsewhere, offline):
    assert run(public) == ""


def run(public: Public) -> str:
    """What is wrong with the example, which sees no names but its own."""
    if not public.docs:
        return "it has no docstring"
    example = doctest.DocTestParser().get_doctest(public.docs, {}, public.name, None, None)
    wanted = "".join(step.want for step in example.examples)
    if not wanted:
        return "its docstring has no example with a result"
    if not re.search(public.called, "".join(step.source for step in example.examples) + wanted):
        return "its example does not use it"
    messages: list[str] = []
    doctest.DocTestRunner(verbose=False).run(example, out=messages.append)
    return "".join(messages)


def test_the_names_are_those_that_one_would_look_for():
    names = {public.name for public in PUBLIC}
    for package in PACKAGES:
        for name in package.__all__:
            assert f"{package.__name__}.{name}" in names
    for name in mosld.presets.PRESETS:
        assert f"mosld.presets.{name}" in names
    assert names >= {
        "mosld.MoSLDLinear.from_linear", "mosld.MoSLDLinear.shared_a", "mosld.MoSLDTrainerMixin.train",
        "mosld.RouterStats.dead", "mosld_kernels.reference.mosld_delta", "mosld.merging.METHODS",
    }  # fmt: skip
    assert "mosld.MoSLDLinear.extra_repr" not in names and "mosld.MoSLDTrainerMixin.log" not in names  # others' own
    assert len(names) == len(PUBLIC)


@pytest.mark.parametrize(
    ("docs", "wrong"),
    [
        ("", "it has no docstring"),
        ("Add two numbers.", "its docstring has no example with a result"),
        (">>> total = sum([1, 2])", "its docstring has no example with a result"),
        (">>> 1 + 2\n3", "its example does not use it"),
        (">>> sum([1, 2])\n4", "Expected:\n    4\nGot:\n    3\n"),
        (">>> sum([1, 2, torch])\n3", "NameError: name 'torch' is not defined"),
        (">>> import warnings\n>>> sum([1, 2], warnings.warn('old') or 0)\n3", "UserWarning: old"),
        (">>> sum([1, 2])\n3", ""),
    ],
)
def test_a_missing_or_wrong_example_is_reported(docs, wrong):
    message = run(Public("package.sum", docs))
    assert wrong in message and bool(wrong) == bool(message)


def test_a_new_public_name_is_collected():
    package = types.ModuleType("package")
    class_of = type("New", (), {"__module__": "mosld.new", "method": lambda self: None, "_own": lambda self: None})
    package.__all__, package.New, package.table = ["New", "table"], class_of, {"a": 1}  # pyright: ignore
    found = public_names([package])
    assert [public.name for public in found] == ["package.New", "package.New.method", "package.table"]
    assert [run(public) for public in found] == ["it has no docstring"] * 3
