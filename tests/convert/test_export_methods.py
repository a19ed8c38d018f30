"""Any mixture whose gates can be fixed leaves as a plain LoRA that computes what it computes with those gates."""

import peft
import pytest
import torch

from mosld import export_lora, presets, set_routing
from mosld.convert.fixed_gates import gate_shape
from mosld.tuner.layer import MoSLDPeftLinear
from tests.helpers.models import perturb, tiny_llama, token_ids

IDS = token_ids()
PREFIX = "base_model.model."
# Presets by what decides their gates: tokens or sequences, the task, or nobody.
BY_INPUT = [
    "mosld", "mosl", "mosld_up", "hydralora", "mola", "loramoe", "moelora", "malora", "mode", "mor1e",
    "mixlora_conditional",
]  # fmt: skip
BY_TASK = ["moelora_medical", "mtl_lora"]
OPTIONS = {
    "mixlora_conditional": {"r": 2, "num_experts": 6, "alpha": 12},
    "mode": {"mixing_options": {"group_size": 2}},
}


def adapted(name: str, **changes):
    targets = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    config = presets.preset(name, **{**targets, **OPTIONS.get(name, {}), **changes})
    model = peft.get_peft_model(tiny_llama(), config)
    torch.manual_seed(1)
    perturb(model)
    return model.eval()


@torch.no_grad()
def with_gates(model, gates: dict, task: int | None = None):
    """The model's logits with every layer's mixing applied to its tokens, in float64, with gates that are given."""

    def fixed(layer, args, output, weights):
        own, m = layer.mixtures["default"], layer.mixtures["default"].mixture
        x = args[0].double()
        mixer = None if own.mixer is None else own.mixer.weight.double()
        if m.kind.per_task:
            mixer = mixer[[task] * len(x)]
        weights = torch.tensor(weights, dtype=torch.float64).view(gate_shape(own))
        gates = weights.expand(*x.shape[:-1], *weights.shape)
        h = m.kind.mix(x @ own.shared_a.weight.double().T, gates, mixer)
        return layer.base_layer(args[0]) + (m.scale * h @ own.expert_b.weight.double().T).float()

    layers = {n.removeprefix(PREFIX): m for n, m in model.named_modules() if isinstance(m, MoSLDPeftLinear)}
    handles = [
        layer.register_forward_hook(lambda *args, weights=gates[name]: fixed(*args, weights))
        for name, layer in layers.items()
    ]
    logits = model(IDS).logits
    for handle in handles:
        handle.remove()
    return logits


def check(folder, expected) -> None:
    """Plain PEFT computes `expected` with the LoRA in `folder`, and something else without it."""
    base = tiny_llama()
    before = base(IDS).logits
    with torch.no_grad():
        loaded = peft.PeftModel.from_pretrained(base, str(folder)).eval()(IDS).logits
    torch.testing.assert_close(loaded, expected, rtol=1e-5, atol=1e-5)
    assert (loaded - before).abs().max() > 1e-3


def rank(folder) -> int:
    return peft.PeftConfig.from_pretrained(str(folder)).r


@pytest.mark.parametrize("name", BY_INPUT)
def test_calibrated_gates_of_every_preset(tmp_path, name):
    model = adapted(name)
    lost = export_lora(model, tmp_path / "lora", gates=[{"input_ids": IDS}])
    check(tmp_path / "lora", with_gates(model, {layer: own.gates for layer, own in lost.items()}))
    own = next(m for m in model.modules() if isinstance(m, MoSLDPeftLinear)).mixtures["default"]
    assert rank(tmp_path / "lora") == min(own.shared_a.weight.shape[0], own.expert_b.weight.shape[1])


@pytest.mark.parametrize(
    ("name", "options"), [("mor1e", {"r_up": 3, "slow_index": "r"}), ("mixlora_conditional", {"selector": "sums"})]
)
def test_calibrated_gates_of_what_follows_the_authors_code(tmp_path, name, options):
    model = adapted(name, r=2, mixing_options=options)
    for parameter_name, parameter in model.named_parameters():
        if name == "mor1e" and "mixer" in parameter_name:
            parameter.data.mul_(0.05)  # a hundred times that goes into a sigmoid
    lost = export_lora(model, tmp_path / "lora", gates=[{"input_ids": IDS}])
    check(tmp_path / "lora", with_gates(model, {layer: own.gates for layer, own in lost.items()}))


@pytest.mark.parametrize("name", [name for name in BY_INPUT if name not in ("mor1e", "mixlora_conditional")])
def test_uniform_gates(tmp_path, name):
    model = adapted(name)
    lost = export_lora(model, tmp_path / "lora")
    assert all(set(own.gates) == {1 / presets.preset(name).num_experts} for own in lost.values())
    check(tmp_path / "lora", with_gates(model, {layer: own.gates for layer, own in lost.items()}))


@pytest.mark.parametrize("name", ["mor1e", "mixlora_conditional"])
def test_mixings_without_uniform_gates_say_so(tmp_path, name):
    with pytest.raises(ValueError, match="has no uniform gates: give calibration batches"):
        export_lora(adapted(name), tmp_path / "lora")


@pytest.mark.parametrize("name", BY_TASK)
@torch.no_grad()
def test_a_task_leaves_exactly(tmp_path, name):
    model = adapted(name, num_tasks=3)
    lost = export_lora(model, tmp_path / "lora", task=2)
    set_routing(model, task_ids=2)
    expected = model(IDS).logits
    check(tmp_path / "lora", expected)
    torch.testing.assert_close(with_gates(model, {layer: own.gates for layer, own in lost.items()}, 2), expected)
    set_routing(model, task_ids=1)
    assert (model(IDS).logits - expected).abs().max() > 1e-4


def test_a_method_that_routes_by_task_asks_for_the_task_and_others_refuse_it(tmp_path):
    with pytest.raises(ValueError, match=r"task must be in \[0, num_tasks=8\) .* got None"):
        export_lora(adapted("mtl_lora"), tmp_path / "lora")
    with pytest.raises(ValueError, match="with that task's own gates"):
        export_lora(adapted("mtl_lora"), tmp_path / "lora", gates=[0.2, 0.3, 0.5], task=1)
    with pytest.raises(ValueError, match="task=1 is for methods that route by task"):
        export_lora(adapted("mosld"), tmp_path / "lora", task=1)


@pytest.mark.parametrize("changes", [{}, {"router": "constant", "num_experts": 3}])
@torch.no_grad()
def test_gates_that_no_token_decides_leave_exactly(tmp_path, changes):
    model = adapted("lora", **changes)
    export_lora(model, tmp_path / "lora")
    check(tmp_path / "lora", model(IDS).logits)


def test_layers_of_other_ranks_are_listed(tmp_path):
    model = adapted("mola", num_experts=4, num_experts_pattern={r"layers\.0\..*": 3})
    lost = export_lora(model, tmp_path / "lora", gates=[{"input_ids": IDS}])
    assert {len(own.gates) for own in lost.values()} == {3, 4}
    check(tmp_path / "lora", with_gates(model, {layer: own.gates for layer, own in lost.items()}))


def test_the_error_of_fixed_gates_is_that_of_a_loop(tmp_path):
    model = adapted("malora", target_modules=["q_proj"])
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, MoSLDPeftLinear):
            module.register_forward_hook(lambda m, args, out, name=name: seen.__setitem__(name, (m, args[0], out)))
    with torch.no_grad():
        lost = export_lora(model, tmp_path / "lora", gates=[{"input_ids": IDS}])
    for name, own in lost.items():
        layer, x, out = seen[PREFIX + name]
        mixture = layer.mixtures["default"]
        routed = (out - layer.base_layer(x)).double()
        z = x.double() @ mixture.shared_a.weight.double().T
        gates = torch.tensor(own.gates, dtype=torch.float64).expand(*x.shape[:-1], len(own.gates))
        h = mixture.mixture.kind.mix(z, gates, mixture.mixer.weight.double())
        fixed = mixture.scale * h @ mixture.expert_b.weight.double().T
        assert own.update_error == pytest.approx(((fixed - routed).norm() / routed.norm()).item(), rel=1e-4)


def test_one_lora_an_expert_needs_a_gate_an_expert(tmp_path):
    with pytest.raises(ValueError, match="per_expert needs a gate for each expert"):
        export_lora(adapted("mode"), tmp_path / "lora", per_expert=True)
