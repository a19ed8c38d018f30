"""A run that has diverged ends with an error before it writes over anything; what is no number is no score."""

import math

import peft
import pytest
import torch
from transformers import TrainingArguments

from mosld import MoSLDConfig, MoSLDTrainer
from mosld.analysis.saved_adapters import expert_numbers
from mosld.cli.main import main
from mosld.mixture import Mixture
from mosld.tasks.encode import Encoded
from mosld.tasks.scoring import log_likelihoods
from mosld.training.finite import MOST_SKIPPED, NotFiniteError, StopsWhereNotFinite
from tests.helpers.models import perturb, tiny_llama, token_ids

DATA = [{"input_ids": row, "labels": row} for row in token_ids()]


def adapted() -> peft.PeftModel:
    config = MoSLDConfig(r=2, num_experts=3, dropout=0.0, target_modules=["q_proj", "down_proj"])
    return peft.get_peft_model(tiny_llama(), config)


def arguments(folder, **changes) -> TrainingArguments:
    settings = dict(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=3, use_cpu=True, report_to="none",
        save_strategy="steps", save_steps=1, disable_tqdm=True, learning_rate=1e-3,
    )  # fmt: skip
    return TrainingArguments(**{**settings, **changes})


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class BreaksAfter(MoSLDTrainer):
    """Its loss is infinite from the fourth step on."""

    def compute_loss(self, model, inputs, **more):
        loss = super().compute_loss(model, inputs, **more)
        return loss * (math.inf if self.state.global_step == 3 else 1.0)


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_training_ends_at_the_first_gradient_that_is_not_finite(tmp_path, max_grad_norm):
    whole = MoSLDTrainer(adapted(), arguments(tmp_path / "three", max_grad_norm=max_grad_norm), train_dataset=DATA)
    torch.manual_seed(0)
    broken = BreaksAfter(adapted(), arguments(tmp_path / "broken", max_grad_norm=max_grad_norm), train_dataset=DATA)
    with pytest.raises(NotFiniteError, match=r"is not finite at step 4.*A smaller learning_rate than 0\.001"):
        broken.train()
    assert all(tensor.isfinite().all() for tensor in weights(broken.model).values())
    kept = sorted(path.name for path in (tmp_path / "broken").glob("checkpoint-*"))
    assert kept == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "broken" / "checkpoint-3", is_trainable=True)
    for name, tensor in weights(again).items():
        assert torch.equal(tensor, broken.model.get_parameter(name))
    whole.train()
    assert whole.state.global_step == 6


def test_a_learning_rate_without_bounds_ends_with_an_error(tmp_path):
    trainer = MoSLDTrainer(adapted(), arguments(tmp_path, learning_rate=1e30, max_steps=20), train_dataset=DATA)
    with pytest.raises(NotFiniteError, match="training has diverged"):
        trainer.train()


def test_a_loss_scaler_may_skip_some_steps():
    class Scaled:
        is_deepspeed_enabled = is_fsdp_enabled = False

        class accelerator:
            scaler = object()

        model = adapted()

    parameter = next(p for p in Scaled.model.parameters() if p.requires_grad)
    parameter.grad = torch.full_like(parameter, math.inf)
    stops = StopsWhereNotFinite(Scaled())
    args, state = TrainingArguments("runs", use_cpu=True, report_to="none"), type("State", (), {"global_step": 5})
    for _ in range(MOST_SKIPPED - 1):
        stops.on_pre_optimizer_step(args, state, None)
    parameter.grad = torch.zeros_like(parameter)
    stops.on_pre_optimizer_step(args, state, None)  # it recovered: the count begins anew
    parameter.grad = torch.full_like(parameter, math.nan)
    for _ in range(MOST_SKIPPED - 1):
        stops.on_pre_optimizer_step(args, state, None)
    with pytest.raises(NotFiniteError, match="at step 6"):
        stops.on_pre_optimizer_step(args, state, None)


def test_no_score_is_made_of_logits_that_are_no_numbers():
    model = adapted()
    perturb(model)
    pairs = [Encoded((3, 4, 5), (6,)), Encoded((7, 8), (9, 10))]
    assert all(math.isfinite(total) for total, _ in log_likelihoods(model, pairs, pad_token_id=1, batch_size=2))
    # Not in a query: attention hides a NaN there behind finite, wrong logits.
    next(p for name, p in model.named_parameters() if "down_proj.mosld" in name).data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="logits are no numbers"):
        log_likelihoods(model, pairs, pad_token_id=1, batch_size=2)


def test_a_diverged_expert_is_not_an_untrained_one(tmp_path, capsys):
    model = adapted()
    perturb(model)
    layer = "base_model.model.model.layers.0.self_attn.q_proj.mosld_expert_b.default.weight"
    with torch.no_grad():
        model.get_parameter(layer)[0, 0] = math.nan
    model.save_pretrained(tmp_path)
    tensors = {
        "shared_a": model.get_parameter(layer.replace("expert_b", "shared_a")).detach(),
        "expert_b": model.get_parameter(layer).detach(),
    }
    numbers = expert_numbers(tensors, Mixture(r=2, num_experts=3))
    assert numbers["untrained"] == [] and math.isnan(numbers["update_norms"][0])
    assert main(["inspect", str(tmp_path)]) == 0
    assert "not finite: it has diverged" in capsys.readouterr().out
