"""`python -m mosld` starts from a checkout that is not installed, and knows its version as an installed one does."""

import contextlib
import importlib.metadata
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from mosld.files.version import __version__

ROOT = Path(__file__).parents[2]
# What an installation of mosld leaves beside the packages: its metadata, and the path of an editable checkout.
OF_MOSLD = ("mosld", "__editable__", "__pycache__")
# Refuses to start where mosld is known to be installed, so that the test cannot pass by accident.
PROGRAM = """
import importlib.metadata, runpy, sys
try:
    found = importlib.metadata.version("mosld")
except importlib.metadata.PackageNotFoundError:
    runpy.run_module("mosld", run_name="__main__", alter_sys=True)
else:
    sys.exit(f"mosld {found} is installed in {sys.path}")
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A folder with the two packages and nothing that an installation adds."""
    folder = tmp_path_factory.mktemp("checkout")
    for package in ("mosld", "mosld_kernels"):
        (folder / package).symlink_to(ROOT / package)
    return folder


@pytest.fixture(scope="module")
def dependencies(tmp_path_factory) -> Path:
    """Everything that is installed here but mosld."""
    folder = tmp_path_factory.mktemp("site-packages")
    for home in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(home).iterdir():
            place = folder / entry.name
            if not entry.name.startswith(OF_MOSLD) and not place.exists():
                place.symlink_to(entry)
    return folder


def run(checkout: Path, dependencies: Path, *words: str) -> subprocess.CompletedProcess:
    # Without `site` (-S) no file of the real site-packages is read; PYTHONPATH has the links alone.
    environment = {**os.environ, "PYTHONPATH": str(dependencies)}
    command = [sys.executable, "-S", "-c", PROGRAM, *words]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=300)


def test_the_version_is_that_of_the_source(checkout, dependencies):
    done = run(checkout, dependencies, "--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"mosld {__version__}\n"


def test_help_is_shown(checkout, dependencies):
    done = run(checkout, dependencies, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: mosld")


@pytest.mark.slow
def test_a_quick_run_trains(checkout, dependencies, tmp_path):
    done = run(checkout, dependencies, "train", "--quick", "--output", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_an_installation_has_the_version_of_the_source():
    assert 'version = { attr = "mosld.files.version.__version__" }' in (ROOT / "pyproject.toml").read_text()
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        assert importlib.metadata.version("mosld") == __version__
