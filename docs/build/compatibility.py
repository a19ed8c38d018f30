"""docs/reference/compatibility.md, from the tests' own lists: `python -m docs.build.compatibility` writes it."""

import inspect
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from docs.build.markdown import table, wrapped
from tests.gpu import test_fsdp as gpu_fsdp
from tests.gpu import test_training
from tests.helpers.architectures import ARCHITECTURES
from tests.integration import test_compiled_checkpoints, test_lm_eval, test_quantised, test_trl
from tests.integration.processes import test_ddp, test_fsdp, test_train, test_zero
from tests.integration.test_compiled_checkpoints import COLUMNS, COMBINATIONS, SETTING
from tests.layers import test_invariances, test_skipped_layers
from tests.training import test_balance_mask, test_loss_scaling
from tests.tuner import test_architectures

PAGE = Path(__file__).parent.parent / "reference/compatibility.md"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "triton")
# Whose tests are skipped where they are not installed.
OPTIONAL = ("bitsandbytes", "torchao", "lm_eval", "trl", "deepspeed")


class Fact(NamedTuple):
    """A test's sentence, and what it is run with: argument -> values."""

    module: str
    text: str
    values: dict[str | tuple, Iterable]

    @property
    def models(self) -> str:
        return ", ".join(self.values["name"]) if "name" in self.values else "LLaMA"

    @property
    def arguments(self) -> str:
        texts = []
        for name, several in self.values.items():
            texts.append(f"{_short(name)}: {', '.join(map(_short, several))}")
        return "; ".join(texts)


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return " and ".join(map(_short, value))
    return getattr(value, "__name__", None) or str(value).removeprefix("torch.")


def _facts(*modules: ModuleType) -> list[Fact]:
    facts = []
    for module in modules:
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if not name.startswith("test_") or function.__module__ != module.__name__:
                continue
            values = {}
            for mark in getattr(function, "pytestmark", []):
                if mark.name == "parametrize":
                    values[mark.args[0]] = mark.args[1]
            sentence = name.removeprefix("test_").replace("_", " ")
            facts.append(Fact(module.__name__.rpartition(".")[2], sentence, values))
    return facts


def _listed(*modules: ModuleType) -> list[str]:
    return [f"- {fact.text}" for fact in _facts(*modules)]


def _models() -> list[str]:
    adapted = []
    for name, architecture in ARCHITECTURES.items():
        targets = architecture.targets
        if not isinstance(targets, str):
            targets = ", ".join(targets)
        adapted.append((name, targets.replace("|", " or "), architecture.layers))
    facts = _facts(test_architectures, test_invariances, test_lm_eval, test_trl)
    shown = [(fact.text, fact.models) for fact in facts]
    architectures = table(("architecture", "adapted in the tests", "layers"), adapted)
    return [*architectures, "", *table(("what a test shows", "on"), shown)]


def _quantised() -> list[str]:
    bases = [(name, base.library, base.stored) for name, base in test_quantised.BASES.items()]
    bases_table = table(("base", "library", "weights are stored as"), bases)
    return ["On a CPU; the layer is called and the update added.", "", *bases_table, "", *_listed(test_quantised)]


def _compiled() -> list[str]:
    combinations = []
    for what, kinds in COMBINATIONS.items():
        for kind, outcomes in kinds.items():
            combinations.append((what, f"{kind}, around every block", *outcomes))
    same = """*Same*: gradients of the task's loss and the balance loss together are those without compiling and without
        checkpoints."""
    setting = f"""*Setting*: `torch._dynamo.config.{SETTING} = True`, without which torch.compile takes no layer inside
        a checkpoint that remembers something, as ours do their logits. It then leaves the checkpointed blocks as they
        are, or refuses, where one graph is asked for (`fullgraph=True`). The setting costs the memory of the logits.
        Where no balance loss is wanted, `mosld.MoSLDAdapter.keep_logits = False` does as well."""
    outcomes = table(("compiled", "checkpoints", *COLUMNS), combinations)
    return [*wrapped(same), "", *wrapped(setting), "", *outcomes, "", *_listed(test_compiled_checkpoints)]


def _balance() -> list[str]:
    facts = _facts(test_loss_scaling, test_balance_mask, test_skipped_layers)
    return table(("what a test shows", "with"), [(fact.text, fact.arguments) for fact in facts])


def _processes() -> list[str]:
    intro = "Two processes on a CPU (gloo). [More about them](../tutorials/several_processes.md)."
    facts = _facts(test_ddp, test_fsdp, test_zero, test_train)
    rows = [(fact.module, fact.text, fact.arguments) for fact in facts]
    return [intro, "", *table(("tests", "what a test shows", "with"), rows)]


def _gpu() -> list[str]:
    intro = """These need an NVIDIA GPU and have not been run on one; without one they are skipped. What each calls is
        run on the CPU by the tests above. The kernels' own tests: [kernels](kernels.md)."""
    return [*wrapped(intro), "", *_listed(test_training, gpu_fsdp)]


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
    sections = []
    for title, lines in SECTIONS.items():
        sections.append("\n".join([f"## {title}", "", *lines()]))
    return "\n\n".join(sections)


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"without {package}, whose tests were skipped"


def page() -> str:
    purpose = (
        "After this page you know which models, quantised bases, compilers and trainers the tests run the library with."
    )
    written = f"""Written by `python -m docs.build.compatibility` from the lists that the tests themselves run; models
        are built from their configurations, with one or two layers. Written with {", ".join(map(_version, PACKAGES))};
        {", ".join(map(_version, OPTIONAL))}. Older versions: [decisions](../design/decisions.md#versions)."""
    return "\n".join(["# Compatibility", "", purpose, "", *wrapped(written), "", tables()]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
