"""pytest-benchmark suite: forward and backward of one layer, MoSLD's and the two it is compared with first."""

import pytest
import torch

from ..peers.compare import inputs_of, mixture_of, phases_of
from ..peers.known import FROZEN, LORA, OURS, build


@pytest.mark.parametrize("peer", [FROZEN, OURS, LORA])
def test_training_step(benchmark, shape, peer):
    linear, x, dout = inputs_of(shape, torch.float32, torch.device("cpu"))
    forward, backward = phases_of(build(peer, linear, mixture_of(shape)), x, dout)
    benchmark.group = "layer, forward + backward"
    gradients = benchmark(lambda: backward(forward()))
    assert gradients[0].shape == x.shape


@pytest.mark.parametrize("peer", [FROZEN, OURS, LORA])
def test_inference(benchmark, shape, peer):
    linear, x, dout = inputs_of(shape, torch.float32, torch.device("cpu"))
    module = build(peer, linear, mixture_of(shape)).eval()
    benchmark.group = "layer, eval"
    with torch.no_grad():
        assert benchmark(lambda: module(x)).shape == dout.shape
