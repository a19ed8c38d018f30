"""transformers' own Trainer adds no balance loss. Whose configuration asks for one is told so, and nobody else is."""

import warnings

import peft
import pytest
from transformers import Trainer, TrainingArguments

from mosld import MoSLDConfig, MoSLDTrainer, balance_loss, localized_balance_loss, presets, set_routing
from tests.helpers.models import checkpoint_layers, perturb, tiny_llama, token_ids

SAID = "balance_coef=0.02 asks for a balance loss, which {} does not add: train with MoSLDTrainer, put mosld.MoSLDTr"


def adapted(config: MoSLDConfig | None = None, base=None, **changes) -> peft.PeftModel:
    fields = {"r": 2, "num_experts": 3, "balance_coef": 0.02, "target_modules": ["q_proj", "down_proj"], **changes}
    model = peft.get_peft_model(base or tiny_llama(), config or MoSLDConfig(**fields))
    perturb(model)
    return model


def told(trainer: type[Trainer], model, tmp_path) -> list[str]:
    """What is said of the balance loss in a training of three steps, two micro-batches each."""
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=1, gradient_accumulation_steps=2, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in token_ids()]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(model, arguments, train_dataset=data).train()
    return [str(warning.message) for warning in caught if "balance" in str(warning.message)]


class OwnLoss(Trainer):
    """A Trainer of one's own that adds the loss itself, as the pages say for loops."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, inputs, *args, **kwargs) + 0.02 * balance_loss(model)


class Localized(Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss + 0.02 * localized_balance_loss(model, kinds=[0] * len(inputs["input_ids"]))


class OtherTask(Trainer):
    """Leaves the model's own loss aside, and the balance loss too."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(input_ids=inputs["input_ids"]).logits.square().mean()


@pytest.mark.parametrize("trainer", [Trainer, OtherTask])
def test_it_is_said_once(trainer, tmp_path):
    (text,) = told(trainer, adapted(), tmp_path)
    assert text.startswith(SAID.format(trainer.__name__))


@pytest.mark.parametrize("reentrant", [True, False])
def test_it_is_said_under_activation_checkpointing(reentrant, tmp_path):
    base = tiny_llama()
    checkpoint_layers(base, reentrant)
    (text,) = told(Trainer, adapted(base=base), tmp_path)
    assert text.startswith(SAID.format("Trainer"))


@pytest.mark.parametrize("trainer", [OwnLoss, Localized, MoSLDTrainer])
def test_nothing_is_said_where_somebody_adds_it(trainer, tmp_path):
    assert told(trainer, adapted(), tmp_path) == []


@pytest.mark.parametrize("changes", [{"balance_coef": 0.0}, {"top_k": 3}, {"router": "task", "num_tasks": 2}])
def test_nothing_is_said_where_there_is_no_loss_to_add(changes, tmp_path):
    model = adapted(**changes)
    if "num_tasks" in changes:
        set_routing(model, task_ids=0)
    assert told(Trainer, model, tmp_path) == []


def test_nothing_is_said_of_a_method_without_a_balance_loss(tmp_path):
    assert told(Trainer, adapted(presets.hydralora(target_modules=["q_proj"])), tmp_path) == []


def test_an_adapter_that_transformers_added_is_told_of_too(tmp_path):
    model = tiny_llama()
    model.add_adapter(MoSLDConfig(r=2, num_experts=3, balance_coef=0.02, target_modules=["q_proj"]))
    (text,) = told(Trainer, model, tmp_path)
    assert text.startswith(SAID.format("Trainer"))
