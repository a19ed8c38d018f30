"""docs/compatibility.md, from the tests' own lists: `python -m tests.compatibility` writes it."""

import inspect
from importlib.metadata import version
from pathlib import Path

from tests.architectures import ARCHITECTURES
from tests.library import test_architectures, test_invariances, test_lm_eval, test_trl

PAGE = Path(__file__).parent.parent / "docs/compatibility.md"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "triton", "lm_eval", "trl")
MODULES = (test_architectures, test_invariances, test_lm_eval, test_trl)


def _facts(module) -> list[tuple[str, str]]:
    """Each test's sentence, and the architectures it runs on."""
    facts = []
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if name.startswith("test_"):
            marks = [mark for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
            on = next((mark.args[1] for mark in marks if mark.args[0] == "name"), None)
            facts.append((name.removeprefix("test_").replace("_", " "), ", ".join(on) if on else "LLaMA"))
    return facts


def tables() -> str:
    """What is tested, without versions."""
    lines = ["| architecture | adapted in the tests | layers |", "|---|---|---|"]
    for name, a in ARCHITECTURES.items():
        targets = a.targets if isinstance(a.targets, str) else ", ".join(a.targets)
        lines.append(f"| {name} | {targets.replace('|', ' or ')} | {a.layers} |")
    lines += ["", "| what a test shows | on |", "|---|---|"]
    lines += [f"| {fact} | {on} |" for module in MODULES for fact, on in _facts(module)]
    return "\n".join(lines)


def page() -> str:
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    return (
        "# Compatibility\n\n"
        "Written by `python -m tests.compatibility` from the lists that the tests themselves run; models are built from\n"
        f"their configurations, with two layers. Written with {versions}.\n"
        "Older versions: `docs/decisions.md`, Versions.\n\n"
        f"{tables()}\n"
    )


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
