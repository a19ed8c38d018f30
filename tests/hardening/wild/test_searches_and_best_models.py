"""Hyperparameter searches train each trial with its own coefficient; the best model is loaded whatever its adapter is
called and however it was added."""

import peft
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from mosld import MoSLDConfig, MoSLDTrainer, balance_loss
from tests.helpers.models import perturb, tiny_llama, token_ids

MIXTURE = dict(r=2, num_experts=3, top_k=1, dropout=0.0, target_modules=["q_proj", "v_proj"])
DATA = [{"input_ids": row, "labels": row} for row in token_ids()]


def arguments(folder, **changes) -> TrainingArguments:
    settings = dict(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=3, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True, learning_rate=0.1, logging_steps=1,
    )  # fmt: skip
    return TrainingArguments(**{**settings, **changes})


def adapted(name="default", **changes) -> peft.PeftModel:
    torch.manual_seed(1)
    model = peft.get_peft_model(tiny_llama(), MoSLDConfig(**{**MIXTURE, **changes}), adapter_name=name)
    perturb(model)
    return model


class Recording(MoSLDTrainer):
    seen: list[float] = []

    def compute_loss(self, model, inputs, **more):
        loss = super().compute_loss(model, inputs, **more)
        with torch.no_grad():
            plain = model(**inputs).loss
            self.seen.append(
                ((loss[0] if isinstance(loss, tuple) else loss) - plain).item() / balance_loss(model).item()
            )
        return loss


def test_every_trial_trains_with_its_own_balance_coef(tmp_path, monkeypatch):
    pytest.importorskip("optuna", reason="optuna, of the extra interop, is not installed")
    monkeypatch.setattr(Recording, "seen", [])
    coefs = iter([0.5, 0.5, 2.0, 4.0])  # __init__ asks for a model too

    def model_init(trial=None):
        return adapted(balance_coef=next(coefs))

    trainer = Recording(model_init=model_init, args=arguments(tmp_path), train_dataset=DATA, eval_dataset=DATA)
    trainer.hyperparameter_search(
        lambda trial: {"seed": trial.suggest_int("seed", 1, 40)}, n_trials=3, compute_objective=lambda metrics: 0.0,
        backend="optuna",
    )  # fmt: skip
    training = [coef for coef in trainer.seen if coef]  # evaluation has none
    assert training == pytest.approx([0.5] * 2 + [2.0] * 2 + [4.0] * 2, rel=1e-3)


def test_an_adapter_that_is_activated_later_brings_its_coefficient(tmp_path):
    model = adapted(balance_coef=0.5)
    model.add_adapter("other", MoSLDConfig(**MIXTURE, balance_coef=3.0))
    trainer = MoSLDTrainer(model=model, args=arguments(tmp_path), train_dataset=DATA)
    assert trainer.balance_coef == 0.5
    model.set_adapter("other")
    assert trainer.balance_coef == 3.0
    assert MoSLDTrainer(model=model, args=arguments(tmp_path), train_dataset=DATA, balance_coef=0.1).balance_coef == 0.1


def backwards(folder, **more):
    """Three steps of which the first counts as the best: the one with the largest loss."""
    return arguments(
        folder, max_steps=3, learning_rate=0.5, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=True, **more,
    )  # fmt: skip


def evaluated(trainer) -> float:
    return trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize("name", ["default", "mine"])
def test_the_best_model_is_loaded_whatever_the_adapter_is_called(tmp_path, name):
    trainer = MoSLDTrainer(model=adapted(name), args=backwards(tmp_path), train_dataset=DATA, eval_dataset=DATA)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.best_metric == max(losses) > losses[-1]
    assert evaluated(trainer) == pytest.approx(max(losses), rel=1e-6)


def through_transformers(name="default"):
    base = tiny_llama()
    torch.manual_seed(1)
    base.add_adapter(MoSLDConfig(**MIXTURE), adapter_name=name)
    perturb(base)
    return base


@pytest.mark.parametrize("name", ["default", "mine"])
def test_the_best_model_of_an_adapter_added_through_transformers(tmp_path, name):
    trainer = MoSLDTrainer(
        model=through_transformers(name), args=backwards(tmp_path), train_dataset=DATA, eval_dataset=DATA
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert max(losses) > losses[-1]
    assert evaluated(trainer) == pytest.approx(max(losses), rel=1e-6)


@pytest.mark.parametrize("name", ["default", "mine"])
def test_a_run_of_an_adapter_added_through_transformers_is_resumed(tmp_path, name):
    settings = dict(save_strategy="steps", save_steps=1)
    whole = MoSLDTrainer(through_transformers(name), arguments(tmp_path / "whole", max_steps=3), train_dataset=DATA)
    whole.train()
    first = arguments(tmp_path / "cut", max_steps=3, **settings)
    cut = MoSLDTrainer(through_transformers(name), first, train_dataset=DATA)
    cut.add_callback(StopAfter(2))
    cut.train()
    again = MoSLDTrainer(through_transformers(name), first, train_dataset=DATA)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    for key, value in whole.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[key], value)


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **more):
        control.should_training_stop = state.global_step >= self.step


def test_the_plain_trainer_tells_that_it_leaves_the_balance_out(tmp_path):
    model = adapted(balance_coef=0.5)
    with pytest.warns(UserWarning, match="balance_coef=0.5 .* MoSLDTrainer") as told:
        Trainer(model=model, args=arguments(tmp_path), train_dataset=DATA).train()
    assert sum("balance_coef" in str(w.message) for w in told) == 1
