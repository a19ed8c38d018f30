"""No source file runs text, opens a pickle, or gives anything to a shell."""

from pathlib import Path

import pytest

from tests.hardening.security.source import faults

ROOT = Path(__file__).parents[3]
FILES = sorted(path for package in ("mosld", "mosld_kernels") for path in (ROOT / package).rglob("*.py"))


def test_the_packages_do_none_of_it():
    assert len(FILES) > 50
    found = {str(path.relative_to(ROOT)): own for path in FILES if (own := faults(path.read_text()))}
    assert found == {}


@pytest.mark.parametrize(
    "text",
    [
        "eval(text)",
        "exec(text)",
        "compile(text, 'x', 'exec')",
        "builtins.eval(text)",
        "__import__(name)",
        "import pickle",
        "import marshal as m",
        "from pickle import loads",
        "from joblib.numpy_pickle import load",
        "import shelve",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "from torch import load",
        "numpy.load(path, allow_pickle=True)",
        "os.system(text)",
        "os.popen(text)",
        "subprocess.run(text)",
        "subprocess.run(f'ls {text}', check=True)",
        "subprocess.run(['ls'], shell=True)",
        "subprocess.Popen(['ls'], shell=flag)",
        "from subprocess import run",
        "yaml.load(text)",
        "Model.from_pretrained(name, trust_remote_code=True)",
        "Model.from_pretrained(name, trust_remote_code=flag)",
        "AutoTokenizer.from_pretrained(name)",
    ],
)
def test_each_is_noticed(text):
    assert len(faults(f"def f():\n    {text}\n")) == 1


@pytest.mark.parametrize(
    "text",
    [
        "model.eval()",
        "torch.compile(model)",
        "re.compile(text)",
        "torch.load(path, weights_only=True)",
        "subprocess.run([sys.executable, '-c', program], check=True)",
        "AutoTokenizer.from_pretrained(name, trust_remote_code=False)",
        "json.load(file)",
    ],
)
def test_what_is_allowed_passes(text):
    assert faults(text) == []
