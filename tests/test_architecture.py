"""Imports point one way, and the packages work where Triton is not installed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mosld_kernels import keep_mask
from tests.helpers.import_graph import circles, import_graph, read_sources

ROOT = Path(__file__).parent.parent
# What each package may import, beside itself and the standard library. The kernels need torch alone: see below.
ALLOWED = {
    "mosld_kernels": {"torch", "triton", "numpy"},
    "mosld": {
        "mosld_kernels", "torch", "transformers", "peft", "accelerate", "safetensors", "huggingface_hub",
        "tokenizers", "numpy", "tqdm", "matplotlib",
    },
}  # fmt: skip


# Folders from the top to the ground; those on one floor know nothing of each other.
FLOORS = {
    "mosld": (
        ("cli",),
        ("experiments", "analysis"),
        ("embedded", "merging"),
        ("presets", "training", "convert"),
        ("tuner",),
        ("layers",),
        ("mixture", "files", "tasks"),
    ),
    "benchmarks": (
        ("__main__", "conftest"),
        ("report", "tune", "long", "sweep"),
        ("cpu", "gpu"),
        ("compile", "model"),
        ("peers",),
        ("timing",),
    ),
}
FLOOR_OF = {
    f"{package}.{room}": number
    for package, floors in FLOORS.items()
    for number, rooms in enumerate(floors)
    for room in rooms
}
# What stands on top of mosld for users alone: nobody inside imports it.
DOORS = {"mosld", "mosld.__main__", "mosld.layer", "mosld.losses", "mosld.trainer"}
PACKAGES = ("mosld_kernels", "mosld", "benchmarks")
SOURCES = read_sources(ROOT, PACKAGES)
FOLDERS = {module.rpartition(".")[0] for module in SOURCES}


def room_of(module: str) -> str:
    """The folder in which a module lies, with its package; of a module on top its own name."""
    return ".".join(module.split(".")[:2])


def wrong_imports(sources: dict[str, str]) -> list[str]:
    """One sentence for each import that runs against the order of packages and folders, and for each circle."""
    graph = import_graph(sources)
    wrong = []
    for module, targets in sorted(graph.items()):
        for target in sorted(targets):
            wrong += _against_packages(module, target)
            if room_of(module) in FLOOR_OF and room_of(target) in FLOOR_OF:
                wrong += _against_folders(module, target)
            if target in DOORS and module.split(".")[0] == "mosld":
                wrong.append(f"{module} imports {target}, which is for users")
    for circle in circles(graph):
        wrong.append(f"{', '.join(sorted(circle))} import each other in a circle")
    return wrong


def _against_packages(module: str, target: str) -> list[str]:
    upper, lower = module.split(".")[0], target.split(".")[0]
    if PACKAGES.index(lower) > PACKAGES.index(upper):
        return [f"{module} imports {target}: {lower} stands above {upper}"]
    return []


def _against_folders(module: str, target: str) -> list[str]:
    own, other = room_of(module), room_of(target)
    if own == other:
        return []
    if target == other and other in FOLDERS:
        return [f"{module} imports the folder {target}, not the file that has the name"]
    if FLOOR_OF[other] <= FLOOR_OF[own]:
        return [f"{module} imports {target}: {other} is not below {own}"]
    return []


def test_no_import_runs_against_the_order_and_none_in_a_circle():
    assert len(SOURCES) > 100
    assert wrong_imports(SOURCES) == []


def test_every_file_of_the_library_lies_in_a_folder_or_is_a_door():
    for module in SOURCES:
        if module.split(".")[0] in FLOORS and module not in {*DOORS, "benchmarks"}:
            assert room_of(module) in FLOOR_OF, module


@pytest.mark.parametrize(
    ("module", "planted", "sentence"),
    [
        ("mosld.layers.linear", "from ..tuner.layer import MoSLDLayer", "mosld.tuner is not below mosld.layers"),
        (
            "mosld.layers.linear",
            "def late():\n    from ..tuner.layer import MoSLDLayer",
            "mosld.tuner is not below mosld.layers",
        ),
        (
            "mosld.files.atomic",
            "if TYPE_CHECKING:\n    from ..mixture.spec import Mixture",
            "mosld.mixture is not below mosld.files",
        ),
        (
            "mosld.training.trainer",
            "from ..convert.export import export_lora",
            "mosld.convert is not below mosld.training",
        ),
        ("mosld.tuner.layer", "from .model import MoSLDModel", "import each other in a circle"),
        ("mosld.tuner.layer", "from ..mixture import Mixture", "imports the folder mosld.mixture"),
        ("mosld.convert.export", "from mosld.layer import MoSLDAdapter", "which is for users"),
        ("mosld.convert.export", "from .. import layer", "which is for users"),
        ("mosld_kernels.eager", "from mosld.mixture.gates import eval_gates", "mosld stands above mosld_kernels"),
        ("mosld_kernels.limits", "def late():\n    from . import dispatch", "import each other in a circle"),
        (
            "benchmarks.timing.files",
            "from benchmarks.peers import known",
            "benchmarks.peers is not below benchmarks.timing",
        ),
        ("benchmarks.model.kernels", "from benchmarks.model import roofline", "import each other in a circle"),
        ("mosld.cli.main", "import benchmarks.__main__", "benchmarks stands above mosld"),
    ],
)
def test_a_planted_wrong_import_is_noticed(module, planted, sentence):
    sources = {**SOURCES, module: f"{SOURCES[module]}\n{planted}\n"}
    assert any(sentence in line and module in line for line in wrong_imports(sources))


def third_parties(source: str) -> set[str]:
    """The packages outside the standard library that a module imports."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names)


@pytest.mark.parametrize("package", ALLOWED)
def test_only_declared_packages_are_imported(package):
    for module, source in SOURCES.items():
        if module.split(".")[0] == package:
            assert third_parties(source) <= ALLOWED[package] | {package}, module


def run_without(*blocked: str, program: str) -> subprocess.CompletedProcess:
    blocker = (
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {blocked!r}:\n"
        "            raise ModuleNotFoundError('blocked: ' + name, name=name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
    )
    return subprocess.run([sys.executable, "-c", blocker + program], capture_output=True, text=True, cwd=ROOT)


def test_the_operator_needs_torch_alone():
    program = (
        "import torch, mosld_kernels as k\n"
        "x, a, b, w = torch.ones(2, 3), torch.ones(2, 3), torch.ones(4, 4), torch.ones(2, 3)\n"
        "seed = torch.tensor([5])\n"
        "print(k.mosld_delta(x, a, b, w, top_k=1, scale=1.0, dropout_p=0.5, seed=seed)[0].shape)\n"
        "print(k.keep_mask(seed, (2, 3), 0.5).tolist())\n"
    )
    result = run_without("triton", "transformers", "peft", "accelerate", "numpy", "matplotlib", "tqdm", program=program)
    assert "torch.Size([2, 4])" in result.stdout, result.stderr
    assert str(keep_mask(torch.tensor([5]), (2, 3), 0.5).tolist()) in result.stdout


@pytest.mark.slow
def test_both_packages_import_and_run_without_triton():
    program = (
        "import torch, mosld\n"
        "layer = mosld.MoSLDLinear(3, 4)\n"
        "layer(torch.ones(2, 3)).sum().backward()\n"
        "print('triton' in sys.modules, layer.expert_b.weight.grad.shape)\n"
    )
    result = run_without("triton", program=program)
    assert "False torch.Size([4, 64])" in result.stdout, result.stderr


def test_the_triton_backend_says_that_triton_is_missing():
    program = (
        "import torch, mosld_kernels as k\n"
        "x, a, b, w = torch.ones(2, 3), torch.ones(2, 3), torch.ones(4, 4), torch.ones(2, 3)\n"
        "try: k.mosld_delta(x, a, b, w, top_k=1, scale=1.0, backend='triton')\n"
        "except RuntimeError as error: print(error)\n"
    )
    result = run_without("triton", program=program)
    assert "backend='triton' cannot run: Triton is not installed; backend='eager' can" in result.stdout, result.stderr


@pytest.mark.slow
def test_importing_registers_the_method_and_draws_no_random_numbers():
    program = (
        "import torch, peft\n"
        "state = torch.get_rng_state()\n"
        "import mosld, mosld_kernels\n"
        "print(torch.equal(state, torch.get_rng_state()), peft.PeftType.MOSLD.value)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "True MOSLD", result.stderr
