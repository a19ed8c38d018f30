"""The load-balance loss and the router statistics, against loops."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mosld import MoSLDLinear, balance_loss, router_stats
from mosld.layers.stats import RouterUse


def layers(*experts_and_k) -> nn.Sequential:
    return nn.Sequential(*(MoSLDLinear(6, 6, r=2, num_experts=e, top_k=k) for e, k in experts_and_k)).double()


def by_loops(logits: torch.Tensor, top_k: int) -> float:
    tokens, experts = logits.shape
    counts, probability = [0] * experts, [0.0] * experts
    for row in logits:
        for e in sorted(range(experts), key=lambda e: -row[e].item())[:top_k]:
            counts[e] += 1
        for e, p in enumerate(row.softmax(0).tolist()):
            probability[e] += p / tokens
    return experts * sum(c / (tokens * top_k) * p for c, p in zip(counts, probability, strict=True))


@pytest.mark.parametrize("sizes", [[(4, 2)], [(8, 1), (3, 2)]])
def test_value_is_the_formula_summed_over_layers(sizes):
    model = layers(*sizes)
    model(torch.randn(5, 7, 6, dtype=torch.float64))
    expected = sum(
        by_loops(layer.adapter.router_logits.flatten(0, 1), k) for layer, (_, k) in zip(model, sizes, strict=True)
    )
    assert balance_loss(model).item() == pytest.approx(expected, rel=1e-12)


def test_even_load_gives_one_and_collapse_gives_e():
    model = layers((4, 1))
    router = model[0].router.weight.data
    router.zero_()
    router[:, :4] = 1e-6 * torch.eye(4)  # each of four tokens prefers its own expert, all but undecided
    model(torch.eye(6, dtype=torch.float64)[:4])
    assert balance_loss(model).item() == pytest.approx(1, rel=1e-5)
    router.zero_()
    router[2] = 100
    model(torch.ones(5, 6, dtype=torch.float64))
    assert balance_loss(model).item() == pytest.approx(4)


def test_padding_is_left_out():
    model = layers((4, 2))
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    model(x)
    masked = balance_loss(model, mask).item()
    stats = router_stats(model, mask)["0"]
    model(x[mask.bool()])
    assert balance_loss(model).item() == pytest.approx(masked) and stats.tokens == 8
    torch.testing.assert_close(router_stats(model)["0"].load, stats.load)


def test_a_layer_that_saw_other_tokens_keeps_all_of_its_own():
    """A pooler sees one token a row, a decoder other tokens than the encoder's mask tells of."""
    model = layers((4, 2), (4, 2))
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    model[1](model[0](x)[:, 0])
    assert [stats.tokens for stats in router_stats(model, mask).values()] == [8, 2]
    assert balance_loss(model, mask).isfinite()


def test_gradients_reach_router_and_input_and_are_right():
    model = layers((5, 2))
    x = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)

    def loss(x, weight):
        model[0].router.weight.data.copy_(weight)
        return torch.func.functional_call(model, {"0.adapter.router.weight": weight}, (x,)) is None or balance_loss(
            model
        )

    weight = model[0].router.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (x, weight))


class Checkpointed(nn.Module):
    """Layers that are run again in backward, each by itself, or not."""

    def __init__(self, mode: str):
        super().__init__()
        self.layers, self.mode = layers((4, 2), (5, 1), (3, 3)), mode

    def forward(self, x):
        for layer in self.layers:
            x = layer(x) if self.mode == "off" else checkpoint(layer, x, use_reentrant=self.mode == "reentrant")
        return x


@pytest.mark.parametrize("aux_first", [False, True])
@pytest.mark.parametrize("mode", ["non-reentrant", "reentrant"])
def test_gradients_are_the_same_under_activation_checkpointing(mode, aux_first):
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    truth = None
    for used in ("off", mode):
        torch.manual_seed(3)
        model = Checkpointed(used).double()
        for p in model.parameters():
            p.data.normal_()
        torch.manual_seed(5)  # the same dropout
        for scale in (1.0, 8.0):  # twice: gradients add up, and a loss scaler multiplies them
            own_x = x.clone().requires_grad_()
            out = model(own_x)
            recomputed = True if used == "reentrant" else None
            if aux_first:
                loss = 0.3 * balance_loss(model, mask, recomputed=recomputed) + out.square().mean()
            else:
                loss = out.square().mean() + 0.3 * balance_loss(model, mask, recomputed=recomputed)
            (scale * loss).backward()
        grads = [loss, own_x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
        if truth is None:
            truth = grads
    for ours, expected in zip(grads, truth, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_asking_twice_under_reentrant_checkpointing_counts_both_times():
    model = Checkpointed("reentrant")
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    grads = []
    for times in (1, 2):
        torch.manual_seed(1)
        out = model(x)
        values = [balance_loss(model, recomputed=True) for _ in range(times)]
        model.zero_grad()
        (0.0 * out.sum() + sum(values)).backward()
        grads.append(model.layers[0].router.weight.grad.clone())
    torch.testing.assert_close(grads[1], 2 * grads[0])
    assert grads[0].norm() > 0


def test_a_frozen_router_still_passes_the_gradient_to_what_feeds_it():
    grads = []
    for mode in ("off", "reentrant"):
        torch.manual_seed(2)
        model = Checkpointed(mode)
        for layer in model.layers:
            layer.router.weight.data.normal_()
            layer.router.requires_grad_(False)
        x = torch.linspace(-1, 1, 60, dtype=torch.float64).view(2, 5, 6).requires_grad_()
        torch.manual_seed(4)
        out = model(x)
        (0.0 * out.sum() + balance_loss(model, recomputed=mode == "reentrant")).backward()
        grads.append(x.grad)
    assert grads[0].abs().max() > 1e-4
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-12)


class BreaksOff(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise MemoryError("as if")


def test_a_backward_that_broke_off_leaves_nothing_for_the_next():
    layer = layers((4, 2))[0].eval()
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    clean = layer.router.weight.grad.clone()
    layer.zero_grad()
    out = checkpoint(layer, x, use_reentrant=True)
    with pytest.raises(MemoryError, match="as if"):
        (BreaksOff.apply(out).sum() + 1000 * balance_loss(layer, recomputed=True)).backward()
    layer.zero_grad()
    layer(x).sum().backward()
    assert torch.equal(layer.router.weight.grad, clean)


def test_an_operation_in_place_may_follow_the_layer():
    block = nn.Sequential(*layers((4, 2)), nn.ReLU(inplace=True)).eval()
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    (block(x).sum() + balance_loss(block)).backward()
    plain = block[0].router.weight.grad.clone()
    block.zero_grad()
    (checkpoint(block, x, use_reentrant=True).sum() + balance_loss(block, recomputed=True)).backward()
    torch.testing.assert_close(block[0].router.weight.grad, plain, rtol=1e-12, atol=1e-12)


def test_a_recomputation_that_does_not_come_is_told():
    model = layers((4, 2))
    with torch.no_grad():
        model(torch.randn(3, 6, dtype=torch.float64))
    loss = balance_loss(model, recomputed=True)
    assert loss.item() > 0
    with pytest.raises(RuntimeError, match="waited for 0 to be run again in backward, which did not happen"):
        loss.backward()
    assert model[0].adapter.deferred_grads is None


def test_a_single_vector_is_one_token():
    model, x = layers((4, 2)), torch.randn(6, dtype=torch.float64)
    seen = []
    for one in (x, x.unsqueeze(0)):
        model(one)
        loss = balance_loss(model)
        (grad,) = torch.autograd.grad(loss, model[0].router.weight)
        seen.append((loss, grad, router_stats(model)["0"]))
    (loss, grad, stats), (expected, expected_grad, expected_stats) = seen
    torch.testing.assert_close((loss, grad), (expected, expected_grad))
    assert (
        stats.tokens == 1
        and stats.dead == expected_stats.dead
        and stats.entropy == pytest.approx(expected_stats.entropy)
    )
    torch.testing.assert_close(stats.gates, expected_stats.gates)


def test_dense_layers_are_left_out():
    model = layers((3, 3))
    model(torch.randn(4, 6, dtype=torch.float64))
    assert balance_loss(model).item() == 0


def test_statistics_are_what_the_routers_did():
    model = layers((4, 1))
    router = model[0].router.weight.data.zero_()
    router[1, 0], router[3, 1] = 50, 50
    x = torch.zeros(4, 6, dtype=torch.float64)
    x[:3, 0], x[3, 1] = 1, 1
    model(x)
    stats = router_stats(model)["0"]
    assert stats.load.tolist() == [0, 0.75, 0, 0.25] and stats.dead == [0, 2] and stats.tokens == 4
    torch.testing.assert_close(stats.probability.sum(), torch.ones((), dtype=torch.float64))
    assert stats.entropy < 1e-9
    router.zero_()
    model(x)
    assert router_stats(model)["0"].entropy == pytest.approx(math.log(4))


def test_use_is_summed_over_batches_and_kept_by_group():
    model, use = layers((4, 2)), RouterUse()
    batches = [torch.randn(3, 6, dtype=torch.float64) for _ in range(3)]
    for batch, group in zip(batches, "aba", strict=True):
        model(batch)
        use.update(group, model)
    model(torch.cat((batches[0], batches[2])))
    assert use.shares()["a"]["0"] == pytest.approx(router_stats(model)["0"].load.tolist())
    assert sum(use.shares()["b"]["0"]) == pytest.approx(1)


def test_what_cannot_be_answered_is_refused():
    with pytest.raises(ValueError, match="Linear has no active MoSLD layer"):
        balance_loss(nn.Linear(2, 2))
    model = layers((4, 2))
    with pytest.raises(RuntimeError, match="no MoSLD layer has run yet"):
        router_stats(model)
    with torch.no_grad():
        model(torch.randn(3, 6, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="kept no gradient for the router of 0"):
        balance_loss(model)
    with pytest.raises(ValueError, match=r"0 saw \[3\] tokens, the mask has \[2, 2\]"):
        router_stats(model, torch.ones(2, 2))
    with torch.no_grad():
        assert balance_loss(model).isfinite()
