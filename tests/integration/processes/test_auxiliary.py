"""Two processes, each with half of the rows, get the auxiliary losses' gradients in the mean over the halves."""

import pytest

from mosld import MoSLDAdapter
from tests.integration.processes.auxiliary import CHECKPOINTING, step
from tests.integration.processes.case import adapted, kept, rows
from tests.integration.processes.launch import assert_same, both, torchrun

pytestmark = pytest.mark.slow


def test_gradients_are_the_mean_of_both_halves(tmp_path, monkeypatch):
    torchrun("tests.integration.processes.auxiliary", str(tmp_path))
    monkeypatch.setattr(MoSLDAdapter, "keep_hidden", True)
    model, total = adapted(), 0
    for half in rows().chunk(2):
        total = total + step(model, half).detach() / 2
    expected = kept(model, total)
    assert set(expected) == {"loss", *(name for name, p in model.named_parameters() if p.requires_grad)}
    expected |= {name: tensor / 2 for name, tensor in expected.items() if name != "loss"}
    for kind in ("ddp", "fsdp"):
        for checkpointing in CHECKPOINTING:
            first, second = both(tmp_path, f"{kind}-{checkpointing}")
            mean = {name: (first[name] + second[name]) / 2 for name in first}
            assert_same(mean, expected)
