"""The balance loss with an attention mask: padding counts for nothing, however much of it there is."""

import pytest
import torch
import torch._dynamo.testing
from torch.utils._python_dispatch import TorchDispatchMode

from mosld import balance_loss, router_stats
from mosld.layers.host import running_adapters
from mosld_kernels.gating import top_k_mask
from tests.training.test_balance import layers

MASKS = {
    "right": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]],
    "left": [[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]],
    "one row away": [[0, 0, 0, 0, 0], [1, 1, 1, 1, 0]],
    "all": [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1]],
    "none": [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0]],
}
X = torch.linspace(-1, 1, 60, dtype=torch.float64).view(2, 5, 6).sin()


def by_indexing(model, mask):
    """The same over the real tokens alone, picked out."""
    total = 0.0
    for _, adapter in running_adapters(model):
        logits = adapter.router_logits[mask.bool()]
        tokens = max(len(logits), 1)
        load = top_k_mask(logits, adapter.top_k).sum(0).double() / (tokens * adapter.top_k)
        total = total + adapter.num_experts * (load * logits.softmax(-1).sum(0) / tokens).sum()
    return total


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_value_and_gradients_are_those_of_the_real_tokens_alone(name, dtype):
    mask, results = torch.tensor(MASKS[name]).to(dtype), []
    model = layers((5, 2), (4, 1)).eval()
    for function in (balance_loss, by_indexing):
        x = X.clone().requires_grad_()
        model.zero_grad()
        model(x)
        loss = function(model, mask)
        loss.backward()
        results.append([loss, x.grad, *(layer.router.weight.grad.clone() for layer in model)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    assert (results[0][1].abs().sum() > 0) == (name != "none")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_padding_holds_does_not_leak(value):
    """Attention can give NaN where a row has no real token."""
    mask = torch.tensor(MASKS["one row away"])
    model = layers((5, 2)).eval()
    model(X)
    clean, logits, stats = balance_loss(model, mask), model[0].adapter.router_logits, router_stats(model, mask)["0"]
    expected = torch.autograd.grad(clean, logits)[0]
    soiled = torch.where(mask.bool().unsqueeze(-1), logits.detach(), value).requires_grad_()
    model[0].adapter.router_logits = 1 * soiled
    loss = balance_loss(model, mask)
    loss.backward()
    assert torch.equal(loss, clean) and torch.equal(soiled.grad, expected)
    assert router_stats(model, mask)["0"].entropy == stats.entropy


class Waits(TorchDispatchMode):
    """Notes the operations whose result the host must know, or whose size depends on values."""

    NAMES = ("nonzero", "item", "_local_scalar_dense", "masked_select", "index.Tensor", "unique", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in str(function) for name in self.NAMES):
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_the_host_waits_for_nothing():
    mask = torch.tensor(MASKS["right"])
    model = layers((5, 2), (4, 1))
    with Waits() as waits:
        mask[mask.bool()].sum().item()
    assert len(waits.seen) >= 2  # it can see them
    with Waits() as waits:
        out = model(X)
        (out.square().mean() + balance_loss(model, mask)).backward()
    assert not waits.seen


@pytest.mark.slow
def test_compiled_whole_one_graph_serves_any_padding():
    model = layers((5, 2), (4, 1)).eval()

    def loss(x, mask):
        return model(x).square().mean() + 0.3 * balance_loss(model, mask)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for rows in MASKS.values():
        results = []
        for function in (compiled, loss):
            x = X.clone().requires_grad_()
            model.zero_grad()
            value = function(x, torch.tensor(rows))
            value.backward()
            results.append([value, x.grad, *(layer.router.weight.grad.clone() for layer in model)])
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    assert counter.frame_count == 1
