import os
import socket

# The tests' tensors are tiny: a second thread only waits for the first, and for minutes where the cores are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")  # datasets reports even what it loads from a local file

import pytest  # noqa: E402
import torch  # noqa: E402

# Without a GPU the Triton kernels run in Triton's interpreter, which has to be chosen before Triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    """Files with slow tests come first: pytest-xdist hands out whole files in this order."""
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)


@pytest.fixture
def offline(monkeypatch):
    """Whoever asks for a connection, in whatever thread, fails the test, even where the asker passes over the error."""
    asked = []

    def refuse(*address, **_):
        asked.append(address)
        raise OSError(f"a test asked for a connection: {address}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("CI", "true")  # TRL counts its users, but not there
    yield
    assert not asked
