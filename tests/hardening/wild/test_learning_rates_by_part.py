"""Optimisers that treat A and B apart: by groups that know what a mixture's weights are, not by LoRA's names."""

import peft
import pytest
import torch

from mosld import MoSLDConfig, parameter_groups, presets
from tests.helpers.models import perturb, tiny_llama, token_ids

TARGETS = ["q_proj", "down_proj"]


def adapted(config=None) -> peft.PeftModel:
    config = config or MoSLDConfig(r=2, num_experts=3, dropout=0.0, target_modules=TARGETS, modules_to_save=["norm"])
    model = peft.get_peft_model(tiny_llama(), config)
    perturb(model)
    return model.double()


def test_each_weight_moves_by_its_own_rate():
    """A step of plain SGD is lr times the gradient: so the rate of each weight can be read off."""
    model = adapted()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    groups = parameter_groups(model, 0.1, b_ratio=4, router_ratio=0.5)
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    torch.optim.SGD(groups).step()
    rates = {"shared_a": 0.1, "expert_b": 0.4, "router": 0.05, "norm": 0.1}
    seen = set()
    for name, old in before.items():
        (part,) = [part for part in rates if f"mosld_{part}." in name] or ["norm"]
        parameter = model.get_parameter(name)
        torch.testing.assert_close(parameter.detach(), old - rates[part] * parameter.grad)
        seen.add(part)
    assert seen == set(rates)


@pytest.mark.parametrize("name", ["mixlora", "hydralora", "mola"])
def test_every_trained_parameter_is_in_one_group(name):
    config = getattr(presets, name)(target_modules=["mlp"] if name == "mixlora" else TARGETS)
    model = adapted(config)
    grouped = [id(p) for group in parameter_groups(model, 1e-3, weight_decay=0.1) for p in group["params"]]
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    assert len(grouped) == len(set(grouped)) and set(grouped) == set(trained)
    names = {group["name"] for group in parameter_groups(model, 1e-3)}
    assert {"a", "b"} <= names


def test_vectors_do_not_decay():
    groups = parameter_groups(adapted(), 1e-3, weight_decay=0.1)
    for group in groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.1 if parameter.dim() > 1 else 0.0)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"lr": 1e-3, "b_ratio": -1}, "b_ratio must be positive, got -1"),
        ({"lr": 1e-3, "router_ratio": float("nan")}, "router_ratio must be positive, got nan"),
        ({"lr": 1e-3, "weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
    ],
)
def test_bad_numbers_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        parameter_groups(adapted(), **values)


def test_a_model_without_mixtures_is_refused():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no MoSLD layer"):
        parameter_groups(tiny_llama(), 1e-3)
