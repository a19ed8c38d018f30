"""Peers compute what they say, on the same weight, with gradients and kept bytes that are counted right."""

import pytest
import torch
from torch import nn

from benchmarks.peers import compare
from benchmarks.peers.known import FROZEN, LORA, OURS, PEERS, Mixture, build, choose, equal_rank, parameters_of
from benchmarks.timing.shapes import LAYERS
from benchmarks.timing.timers import Budget
from mosld_kernels import reference

TWICE = Budget(2, 60.0, 2)
TOY = LAYERS["toy"]
FEW = choose((OURS, LORA))


def test_saved_bytes_are_counted_exactly():
    rows = {r["name"]: r for r in compare.compare(FEW, TOY, torch.float32, TWICE) if r["step"] == "both"}
    T, _, _, R, E, _ = TOY
    assert rows[FROZEN]["saved_bytes"] == 0
    assert rows[OURS]["saved_bytes"] == 4 * T * (R + E) + 8  # hidden, gates, seed
    assert rows[LORA]["saved_bytes"] > 4 * T * TOY.D_in  # the dropped x at least


def test_the_peers_work_on_the_same_weight_and_are_what_they_claim():
    linear, x = nn.Linear(12, 10).double().requires_grad_(False), torch.randn(6, 12, dtype=torch.float64)
    everyone = Mixture(r=3, num_experts=4, top_k=4, dropout=0.0)
    torch.manual_seed(1)
    ours = build(OURS, linear, everyone)
    adapter = ours.adapter
    tensors = (adapter.shared_a.weight, adapter.expert_b.weight, adapter.router.weight)
    truth, _ = reference.mosld_linear(x, linear.weight, linear.bias, *tensors, top_k=4, scale=2.0)
    torch.testing.assert_close(ours(x), truth)
    # Without dropout and with every expert chosen, these are MoSLD's formula.
    for name in ("formula in plain torch", "concatenated product", "HydraLoRA loop"):
        peer = build(name, linear, everyone)
        peer.layer.adapter.load_state_dict(adapter.state_dict())
        torch.testing.assert_close(peer(x), truth, msg=name)
    # The same of two experts of four, for the one that chooses.
    peer = build("concatenated product", linear, Mixture(3, 4, 2, 0.0))
    peer.layer.adapter.load_state_dict(adapter.state_dict())
    few, _ = reference.mosld_linear(x, linear.weight, linear.bias, *tensors, top_k=2, scale=2.0)
    torch.testing.assert_close(peer(x), few)
    # MoLA's loop, whose experts have an A each: with equal ones it is MoSLD.
    loop = build("MoLA loop", linear, Mixture(3, 4, 2, 0.0))
    with torch.no_grad():
        for e in range(4):
            loop.a[e].copy_(tensors[0])
            loop.b[e].copy_(tensors[1].view(10, 4, 3)[:, e])
        loop.router.copy_(tensors[2])
    torch.testing.assert_close(loop(x), few)
    # And the loop in one fused operator, whatever the A's are.
    own = build("ours, an A per expert (MoLA)", linear, Mixture(3, 4, 2, 0.0))
    with torch.no_grad():
        for e in range(4):
            loop.a[e].copy_(own.adapter.shared_a.weight.view(4, 3, 12)[e])
            loop.b[e].copy_(own.adapter.expert_b.weight.view(10, 4, 3)[:, e])
        loop.router.copy_(own.adapter.router.weight)
    torch.testing.assert_close(own(x), loop(x))
    lora = build("PEFT LoRA", linear, everyone)
    update = lora.lora_B["default"](lora.lora_A["default"](x)) * lora.scaling["default"]
    torch.testing.assert_close(lora(x), linear(x) + update)
    fused = build("fused LoRA pattern, no dropout", linear, everyone)
    torch.testing.assert_close(fused(x), linear(x) + 2 * x @ fused.a.t() @ fused.b.t())


@pytest.mark.parametrize("name", [name for name in PEERS if "compiled" not in name])
def test_a_step_gives_every_trained_tensor_its_gradient(name):
    linear, x, dout = compare.inputs_of(TOY, torch.float64, torch.device("cpu"))
    try:
        module = build(name, linear, Mixture(3, 4, 2, 0.0))
    except RuntimeError as absent:
        assert type(absent).__name__ == "Absent" and str(absent)
        return
    forward, backward = compare.phases_of(module, x, dout)
    grads = backward(forward())
    assert len(grads) == 1 + sum(p.requires_grad for p in module.parameters())
    # Finite differences along one direction through all of them.
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    directions, h = [torch.randn_like(t) for t in wanted], 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for tensor, direction in zip(wanted, directions, strict=True):
                tensor.add_(direction, alpha=sign * h)
            values.append((forward() * dout).sum())
            for tensor, direction in zip(wanted, directions, strict=True):
                tensor.sub_(direction, alpha=sign * h)
    slope = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
    torch.testing.assert_close((values[0] - values[1]) / (2 * h), slope, rtol=1e-4, atol=1e-4)


def test_the_rank_of_equal_parameters():
    linear, mixture = nn.Linear(1024, 1024, device="meta"), Mixture(8, 8, 2, 0.1)
    assert parameters_of(linear, mixture) == 1024 * (8 + 8 * 8 + 8) == 81_920
    assert equal_rank(linear, mixture) == 40  # 2 * 1024 * 40 = 81,920
