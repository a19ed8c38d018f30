import os

# The tests' tensors are tiny: a second thread only waits for the first, and for minutes where the cores are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
