"""A trained LoRA becomes any mixture whose gates sum to one, which computes the same at first."""

import peft
import pytest
import torch

from mosld import import_lora, set_routing
from tests.helpers.models import perturb, tiny_llama, token_ids

IDS = token_ids()


@pytest.fixture
def lora(tmp_path):
    """-> the folder of a trained LoRA, and its logits"""
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"]))
    perturb(model)
    model.save_pretrained(str(tmp_path))
    with torch.no_grad():
        return tmp_path, model.eval()(IDS).logits


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gate": "softmax", "num_experts": 3, "input_dropout": 0.1},
        {"mixing": "diagonal", "num_experts": 3},
        {"shared": "up"},
        {"router": "constant", "num_experts": 5},
        {"router": "none", "num_experts": 1, "top_k": 1},
        {"router": "task", "num_tasks": 2, "gate": "softmax"},
        {"router": "hidden", "gate": "top_p"},
    ],
    ids=str,
)
@torch.no_grad()
def test_the_mixture_starts_as_the_lora(lora, settings):
    folder, expected = lora
    model = import_lora(tiny_llama(), folder, **settings).eval()
    if "num_tasks" in settings:
        set_routing(model, task_ids=1)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    assert (tiny_llama()(IDS).logits - expected).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixing": "core"}, "a LoRA becomes a mixture with mixing 'expand', 'diagonal' or 'reduce', got 'core'"),
        ({"router": "external"}, "router='external' with num_experts=8 has gates that need not sum to one"),
        ({"router": "none"}, "router='none' with num_experts=8 has gates that need not sum to one"),
    ],
)
def test_a_mixture_that_would_start_as_something_else_is_refused(lora, settings, message):
    base = tiny_llama()
    with pytest.raises(ValueError, match=message):
        import_lora(base, lora[0], **settings)
    assert not any("mosld" in name for name, _ in base.named_modules())
