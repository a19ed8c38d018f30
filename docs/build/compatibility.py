"""docs/reference/compatibility.md, from the tests' own lists: `python -m tests.compatibility` writes it."""

import inspect
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

from tests.architectures import ARCHITECTURES
from tests.gpu import test_fsdp as gpu_fsdp
from tests.gpu import test_training
from tests.library import (
    test_architectures,
    test_balance_mask,
    test_compiled_checkpoints,
    test_invariances,
    test_lm_eval,
    test_loss_scaling,
    test_quantised,
    test_skipped_layers,
    test_trl,
)
from tests.library.test_compiled_checkpoints import COLUMNS, COMBINATIONS, SETTING
from tests.processes import test_ddp, test_fsdp, test_train, test_zero

PAGE = Path(__file__).parent.parent / "docs/reference/compatibility.md"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "triton")
# Whose tests are skipped where they are not installed.
OPTIONAL = ("bitsandbytes", "torchao", "lm_eval", "trl", "deepspeed")


def _facts(module: ModuleType) -> list[tuple[str, dict[str | tuple, Iterable]]]:
    """Each test's sentence, and what it is run with: argument -> values."""
    facts = []
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if name.startswith("test_") and function.__module__ == module.__name__:
            marks = [mark for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
            facts.append((name.removeprefix("test_").replace("_", " "), {mark.args[0]: mark.args[1] for mark in marks}))
    return facts


def _table(*rows: Iterable[object]) -> list[str]:
    """The first row is the head."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return [lines[0], "|" + "---|" * lines[0].count(" | ") + "---|", *lines[1:]]


def _models() -> list[str]:
    adapted = [
        (name, (a.targets if isinstance(a.targets, str) else ", ".join(a.targets)).replace("|", " or "), a.layers)
        for name, a in ARCHITECTURES.items()
    ]
    shown = [
        (fact, ", ".join(values["name"]) if "name" in values else "LLaMA")
        for module in (test_architectures, test_invariances, test_lm_eval, test_trl)
        for fact, values in _facts(module)
    ]
    return [
        *_table(("architecture", "adapted in the tests", "layers"), *adapted),
        "",
        *_table(("what a test shows", "on"), *shown),
    ]


def _quantised() -> list[str]:
    bases = [(name, base.library, str(base.stored)) for name, base in test_quantised.BASES.items()]
    return [
        "On a CPU; the layer is called and the update added.",
        "",
        *_table(("base", "library", "weights are stored as"), *bases),
        "",
        *(f"- {fact}" for fact, _ in _facts(test_quantised)),
    ]


def _compiled() -> list[str]:
    combinations = [
        (what, f"{kind}, around every block", *outcomes)
        for what, kinds in COMBINATIONS.items()
        for kind, outcomes in kinds.items()
    ]
    return [
        "*Same*: gradients of the task's loss and the balance loss together are those without compiling and without checkpoints.",
        f"*Setting*: `torch._dynamo.config.{SETTING} = True`, without which torch.compile takes no",
        "layer inside a checkpoint that remembers something, as ours do their logits. It then leaves the checkpointed blocks as they",
        "are, or refuses, where one graph is asked for (`fullgraph=True`). The setting costs the memory of the logits. Where no balance loss",
        "is wanted, `mosld.MoSLDAdapter.keep_logits = False` does as well.",
        "",
        *_table(("compiled", "checkpoints", *COLUMNS), *combinations),
        "",
        *(f"- {fact}" for fact, _ in _facts(test_compiled_checkpoints)),
    ]


def _balance() -> list[str]:
    modules = (test_loss_scaling, test_balance_mask, test_skipped_layers)
    return _table(
        ("what a test shows", "with"),
        *((fact, _with(values)) for module in modules for fact, values in _facts(module)),
    )


def _with(values: dict[str | tuple, Iterable]) -> str:
    return "; ".join(f"{_short(name)}: {', '.join(map(_short, several))}" for name, several in values.items())


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return " and ".join(map(_short, value))
    return getattr(value, "__name__", None) or str(value).removeprefix("torch.")


def _processes() -> list[str]:
    modules = (test_ddp, test_fsdp, test_zero, test_train)
    return [
        "Two processes on a CPU (gloo). [More about them](processes.md).",
        "",
        *_table(
            ("tests", "what a test shows", "with"),
            *(
                (module.__name__.rpartition(".")[2], fact, _with(values))
                for module in modules
                for fact, values in _facts(module)
            ),
        ),
    ]


def _gpu() -> list[str]:
    return [
        "These need an NVIDIA GPU and have not been run on one; without one they are skipped. What each calls is run on the CPU by",
        "the tests above. The kernels' own tests: [kernels](kernels.md).",
        "",
        *(f"- {fact}" for module in (test_training, gpu_fsdp) for fact, _ in _facts(module)),
    ]


SECTIONS = {
    "Models": _models,
    "Quantised bases": _quantised,
    "The balance loss with torch.compile and activation checkpointing": _compiled,
    "The balance loss with loss scaling, padding and skipped layers": _balance,
    "Several processes": _processes,
    "On a GPU": _gpu,
}


def tables() -> str:
    """What is tested, without versions."""
    return "\n\n".join("\n".join([f"## {title}", "", *lines()]) for title, lines in SECTIONS.items())


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"without {package}, whose tests were skipped"


def page() -> str:
    return (
        "# Compatibility\n\n"
        "Written by `python -m tests.compatibility` from the lists that the tests themselves run; models are built from\n"
        f"their configurations, with one or two layers. Written with {', '.join(map(_version, PACKAGES))};\n"
        f"{', '.join(map(_version, OPTIONAL))}. Older versions: `docs/design/decisions.md`, Versions.\n\n"
        f"{tables()}\n"
    )


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
