"""Imports point one way, and the packages work where Triton is not installed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mosld_kernels import keep_mask

ROOT = Path(__file__).parent.parent
# What each package may import, beside itself and the standard library. The kernels need torch alone: see the test below.
ALLOWED = {
    "mosld_kernels": {"torch", "triton", "numpy"},
    "mosld": {
        "mosld_kernels", "torch", "transformers", "peft", "accelerate", "safetensors", "huggingface_hub",
        "tokenizers", "numpy", "tqdm", "matplotlib",
    },
}  # fmt: skip


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names)


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_one_way(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        assert imported(path) <= ALLOWED[package] | {package}, path


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
