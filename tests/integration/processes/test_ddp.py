"""Two processes under DDP compute what one does on the whole batch, though each leaves experts without a token."""

import pytest
from safetensors.torch import load_file

from tests.integration.processes.case import alone, trained
from tests.integration.processes.launch import assert_same, both, torchrun

pytestmark = pytest.mark.slow
FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    torchrun("tests.integration.processes.ddp", str(folder))
    return folder


def test_each_process_leaves_experts_to_the_other(run):
    first, second = both(run, "loads")
    assert len(first) == 6
    for name, load in first.items():
        assert (load * second[name] == 0).all() and (load == 0).any(), name


@pytest.mark.parametrize("find_unused_parameters", [False, True])
def test_loss_and_gradients_are_those_of_one_process(run, find_unused_parameters):
    first, second = both(run, str(find_unused_parameters))
    expected = alone()[1]
    assert len(expected) == 1 + 3 * 6
    first["loss"] = (first["loss"] + second.pop("loss")) / 2
    assert_same(first, expected)
    del first["loss"]
    assert_same(second, first, share=0)


def test_the_trainers_steps_are_those_of_one_process_that_accumulates(run, tmp_path):
    first, second = both(run, "trained")
    assert_same(first, trained(tmp_path, accumulation=2))
    assert_same(second, first, share=0)
    saved, expected = (load_file(folder / "adapter" / FILE) for folder in (run / "trainer", tmp_path))
    assert_same(saved, expected)
