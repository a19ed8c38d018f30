"""MoSLDTrainer's gradients are those of loss + coef * balance loss, however the batch is cut into micro-batches."""

import peft
import pytest
import torch
from transformers import Trainer, TrainingArguments

from mosld import (
    MoSLDAdapter,
    MoSLDConfig,
    MoSLDLinear,
    MoSLDTrainer,
    MoSLDTrainerMixin,
    balance_loss,
    contrastive_loss,
    localized_balance_loss,
)
from tests.helpers.models import perturb, tiny_llama, token_ids

# transformers' own Trainer stands beside ours in some of these tests, and is told of.
pytestmark = pytest.mark.filterwarnings("ignore:balance_coef=.* asks for a balance loss")
COEF = 0.5
ROWS = [{"input_ids": row, "labels": row} for row in token_ids(rows=8, length=6)]


def adapted():
    model = peft.get_peft_model(
        tiny_llama(),
        MoSLDConfig(r=2, num_experts=4, dropout=0.0, balance_coef=COEF, target_modules=["q_proj", "v_proj"]),
    )
    torch.manual_seed(4)
    perturb(model)
    return model


def trained(
    tmp_path, trainer_class=MoSLDTrainer, accumulation=1, arguments=(), rows=ROWS, parts=("router",), **changes
):
    """Router weights, or those of other `parts`, after one SGD step of lr 1 on all eight rows."""
    model = adapted()
    settings = dict(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=8 // accumulation, learning_rate=1.0,
        gradient_accumulation_steps=accumulation, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0,
        report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    arguments = TrainingArguments(**{**settings, **dict(arguments)})
    trainer_class(model=model, args=arguments, train_dataset=rows, **changes).train()
    named = [(n, p) for n, p in model.named_parameters() if any(part in n for part in parts)]
    return torch.cat([p.detach().flatten().cpu() for _, p in named])


def penalty_by_hand(accumulation):
    """COEF times the gradient of the balance loss, in the mean over micro-batches."""
    model = adapted().train()
    routers = [p for n, p in model.named_parameters() if "router" in n]
    rows = torch.stack([row["input_ids"] for row in ROWS])[_trainer_order()]
    for part in rows.chunk(accumulation):
        model(part)
        (COEF * balance_loss(model) / accumulation).backward()
    return torch.cat([p.grad.flatten() for p in routers])


def _trainer_order():
    """The order in which Trainer's sampler visits eight rows: from its argument `seed`, 42 by default."""
    return torch.randperm(8, generator=torch.Generator().manual_seed(42))


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_the_penalty_is_the_mean_over_micro_batches_beside_the_trainers_own_loss(tmp_path, accumulation):
    """With SGD at lr 1, what MoSLDTrainer's step adds to Trainer's is the penalty's gradient and nothing else."""
    added = trained(tmp_path, Trainer, accumulation) - trained(tmp_path, MoSLDTrainer, accumulation)
    torch.testing.assert_close(added, penalty_by_hand(accumulation), rtol=1e-4, atol=1e-6)
    assert added.abs().max() > 1e-2


def checkpointing(use_reentrant):
    """TrainingArguments' for activation checkpointing, which transformers renames."""
    name = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
    return {f"{name}_checkpointing": True, f"{name}_checkpointing_kwargs": {"use_reentrant": use_reentrant}}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_activation_checkpointing_of_either_kind_changes_nothing(tmp_path, accumulation, use_reentrant):
    plain = trained(tmp_path, accumulation=accumulation)
    ours = trained(tmp_path, accumulation=accumulation, arguments=checkpointing(use_reentrant))
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("use_reentrant", [None, False, True], ids=["no-checkpoints", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_under_bfloat16_autocast_the_penalty_has_the_same_weight(tmp_path, accumulation, use_reentrant):
    bfloat16_penalty(tmp_path, accumulation, **({} if use_reentrant is None else checkpointing(use_reentrant)))


def bfloat16_penalty(folder, accumulation, **arguments):
    arguments = {"bf16": True, **arguments}
    plain, ours = (trained(folder, cls, accumulation, arguments=arguments) for cls in (Trainer, MoSLDTrainer))
    added, expected = plain - ours, penalty_by_hand(accumulation)
    torch.testing.assert_close(added, expected, rtol=0.1, atol=0.05 * added.abs().max().item())
    assert added.abs().max() > 1e-2


def test_no_weight_is_no_penalty(tmp_path):
    assert torch.equal(trained(tmp_path, Trainer), trained(tmp_path, balance_coef=0.0))


def test_the_evaluation_loss_is_the_tasks_own(tmp_path):
    losses = []
    for trainer_class in (Trainer, MoSLDTrainer):
        arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True,
                                      dataloader_pin_memory=False)  # fmt: skip
        losses.append(trainer_class(model=adapted(), args=arguments, eval_dataset=ROWS).evaluate()["eval_loss"])
    assert losses[0] == losses[1]


def test_layers_adapted_by_hand_get_the_default_weight(tmp_path):
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj = MoSLDLinear.from_linear(model.model.layers[0].mlp.up_proj, num_experts=4)
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    assert MoSLDTrainer(model=model, args=arguments).balance_coef == 1e-3


def test_only_active_adapters_say_how_much_the_penalty_weighs(tmp_path):
    model = adapted()
    model.add_adapter("other", MoSLDConfig(r=2, num_experts=4, balance_coef=0.25, target_modules=["q_proj"]))
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    assert MoSLDTrainer(model=model, args=arguments).balance_coef == COEF
    model.set_adapter("other")
    assert MoSLDTrainer(model=model, args=arguments).balance_coef == 0.25
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(
        ValueError, match=r"active adapters have different balance_coef \[0.25, 0.5\]: pass balance_coef"
    ):
        MoSLDTrainer(model=model, args=arguments)
    assert MoSLDTrainer(model=model, args=arguments, balance_coef=0.125).balance_coef == 0.125


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="does not run under nn.DataParallel.*torchrun"):
        MoSLDTrainer(model=adapted(), args=arguments)


def test_the_mixin_serves_any_trainer_and_a_loss_of_ones_own(tmp_path):
    class Mine(MoSLDTrainerMixin, Trainer):
        pass

    def own_loss(outputs, labels, num_items_in_batch=None):
        loss = torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        return loss / num_items_in_batch

    moved = [trained(tmp_path, Mine, accumulation=a, compute_loss_func=own_loss, balance_coef=COEF) for a in (1, 4)]
    plain = [trained(tmp_path, Trainer, accumulation=a, compute_loss_func=own_loss) for a in (1, 4)]
    # The task's share is the same for any accumulation, and so is the size of the penalty's.
    torch.testing.assert_close(plain[0], plain[1], rtol=1e-4, atol=1e-6)
    sizes = [(m - p).norm().item() for m, p in zip(moved, plain, strict=True)]
    assert 0.7 < sizes[1] / sizes[0] < 1.4


def columns(rows=ROWS):
    return [{**row, "kind": i % 2} for i, row in enumerate(rows)]


AUXILIARY = {
    "localized": (0.3, lambda model, batch: localized_balance_loss(model, batch["kind"])),
    "contrast": (0.2, lambda model, batch: contrastive_loss(model, tokens=1000)),
}


def auxiliary_by_hand(accumulation):
    model = adapted().train()
    trained_ones = [p for n, p in model.named_parameters() if "router" in n or "shared_a" in n or "expert_b" in n]
    order = _trainer_order()
    rows, kinds = torch.stack([row["input_ids"] for row in ROWS])[order], order % 2
    for part, kind in zip(rows.chunk(accumulation), kinds.chunk(accumulation), strict=True):
        model(part)
        loss = 0.3 * localized_balance_loss(model, kind) + 0.2 * contrastive_loss(model, tokens=1000)
        (loss / accumulation).backward()
    return torch.cat([p.grad.flatten() for p in trained_ones])


@pytest.mark.parametrize("checkpointing", ["off", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_auxiliary_losses_are_added_with_their_weights_in_every_setting(
    tmp_path, accumulation, checkpointing, monkeypatch
):
    """What they add to a step of SGD at lr 1 is the gradient of their weighted mean over micro-batches."""
    monkeypatch.setattr(MoSLDAdapter, "keep_hidden", True)
    more = {}
    if checkpointing != "off":
        new = hasattr(TrainingArguments, "activation_checkpointing")
        name = "activation_checkpointing" if new else "gradient_checkpointing"
        more = {name: True, f"{name}_kwargs": {"use_reentrant": checkpointing == "reentrant"}}
    plain, ours = (
        trained(tmp_path, accumulation=accumulation, arguments=more, rows=columns(),
                parts=("router", "shared_a", "expert_b"), auxiliary_losses=losses, auxiliary_columns=["kind"],
                balance_coef=0.0)
        for losses in ({}, AUXILIARY)
    )  # fmt: skip
    expected = auxiliary_by_hand(accumulation)
    torch.testing.assert_close(plain - ours, expected, rtol=1e-3, atol=1e-5)
    assert expected.abs().max() > 1e-2


def test_auxiliary_losses_are_logged_and_their_columns_stay_out_of_the_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr(MoSLDAdapter, "keep_hidden", True)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, logging_steps=2, report_to="none",
        use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, save_strategy="no", learning_rate=0.0,
    )  # fmt: skip
    trainer = MoSLDTrainer(
        model=(model := adapted()), args=arguments, train_dataset=columns(), eval_dataset=columns(),
        auxiliary_losses=AUXILIARY, auxiliary_columns=["kind"],
    )  # fmt: skip
    seen = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    model, order, values = adapted().train(), _trainer_order(), []
    for rows in order.chunk(2):
        model(torch.stack([row["input_ids"] for row in ROWS])[rows])
        values.append(localized_balance_loss(model, rows % 2).item())
    assert logged["localized"] == pytest.approx(sum(values) / 2, rel=1e-4)
    assert logged["contrast"] > 0 and logged["balance_loss"] > 0
    assert trainer.evaluate()["eval_loss"] > 0
    assert len(seen) >= 3 and all("kind" not in names for names in seen)


def test_an_auxiliary_loss_needs_a_name_of_its_own(tmp_path):
    with pytest.raises(ValueError, match="names of their own, got balance_loss"):
        MoSLDTrainer(model=adapted(), auxiliary_losses={"balance_loss": (1.0, balance_loss)})


class RunsAgain(Trainer):
    """As TRL's trainers do: no outputs unless asked for, and another forward without gradients for metrics."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        assert not return_outputs
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        with torch.no_grad():
            model(input_ids=inputs["input_ids"].flip(1))
        return loss


class InHalves(Trainer):
    """Runs the model on each half of a batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        halves = [{name: value.chunk(2)[i] for name, value in inputs.items()} for i in (0, 1)]
        return sum(model(**half).loss for half in halves) / 2


class PastTheHooks(Trainer):
    """Asks the model for its loss in another way than by calling it."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model.get_base_model()(**inputs).loss


KINDS = {"off": {}, "non-reentrant": {"use_reentrant": False}, "reentrant": {"use_reentrant": True}}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's, of a forward without gradients
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("trainer_class", "parts"), [(RunsAgain, 1), (InHalves, 2), (PastTheHooks, 1)])
def test_the_penalty_is_that_of_the_forwards_that_are_trained(tmp_path, trainer_class, parts, kind):
    class Mine(MoSLDTrainerMixin, trainer_class):
        pass

    arguments = checkpointing(**KINDS[kind]) if KINDS[kind] else {}
    plain, ours = (trained(tmp_path, cls, arguments=arguments) for cls in (trainer_class, Mine))
    torch.testing.assert_close(plain - ours, penalty_by_hand(parts), rtol=1e-4, atol=1e-6)


def test_outputs_that_are_asked_for_in_training_come_with_the_same_loss(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    trainer = MoSLDTrainer(model=adapted().train(), args=arguments)
    ids = token_ids()
    batch = {"input_ids": ids, "labels": ids}
    loss, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    assert torch.equal(trainer.compute_loss(trainer.model, dict(batch)), loss)
    assert torch.equal(outputs.logits, trainer.model(ids).logits)
    expected = outputs.loss + COEF * balance_loss(trainer.model)
    torch.testing.assert_close(loss, expected)
