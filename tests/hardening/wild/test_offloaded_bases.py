"""A base whose weights lie on the host or on disk and come to the device layer by layer: adapted, trained and saved as
any other."""

import peft
import pytest
import torch
from accelerate import cpu_offload, disk_offload

from mosld import MoSLDConfig
from tests.helpers.models import perturb, tiny_llama, token_ids


def offloaded(kind: str, folder):
    base = tiny_llama()
    if kind == "cpu":
        cpu_offload(base, execution_device=torch.device("cpu"))
    else:
        disk_offload(base, str(folder), execution_device=torch.device("cpu"))
    assert base.model.layers[0].self_attn.q_proj.weight.is_meta
    return base


def config(**changes) -> MoSLDConfig:
    return MoSLDConfig(r=2, num_experts=3, dropout=0.0, target_modules=["q_proj", "down_proj"], **changes)


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_an_offloaded_base_is_adapted_and_trained(kind, tmp_path):
    with torch.no_grad():
        frozen = tiny_llama()(token_ids()).logits
    results = []
    for base in (tiny_llama(), offloaded(kind, tmp_path / "weights")):
        torch.manual_seed(1)
        model = peft.get_peft_model(base, config())
        assert {p.device.type for p in model.parameters() if p.requires_grad} == {"cpu"}
        with torch.no_grad():
            assert torch.equal(model(input_ids=token_ids()).logits, frozen)
        torch.manual_seed(2)
        perturb(model)
        out = model(input_ids=token_ids(), labels=token_ids())
        out.loss.backward()
        results.append((out.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
        model.save_pretrained(tmp_path / "adapter")
    (plain, expected), (ours, found) = results
    torch.testing.assert_close(ours, plain)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, msg=name)


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_a_saved_adapter_is_loaded_onto_an_offloaded_base(kind, tmp_path):
    model = peft.get_peft_model(tiny_llama(), config())
    perturb(model)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(offloaded(kind, tmp_path / "weights"), tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=token_ids()).logits, model.eval()(input_ids=token_ids()).logits)
