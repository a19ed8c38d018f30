"""A `task_ids` column: each batch is routed by its own, in training, evaluation and prediction, from any collator."""

import peft
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.nn import functional as F
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from mosld import MoSLDTrainer, MoSLDTrainerMixin, presets, set_routing
from tests.helpers.models import perturb, tiny_llama, token_ids

IDS = token_ids(rows=8, length=6)
TASKS = [3, 0, 5, 0, 7, 2, 1, 4]
ROWS = [{"input_ids": row, "labels": row, "task_ids": task} for row, task in zip(IDS, TASKS, strict=True)]
CLOSE = dict(rtol=1e-4, atol=1e-5)


def adapted(name="mtl_lora", **changes):
    model = peft.get_peft_model(
        tiny_llama(), presets.preset(name, **{"target_modules": ["q_proj", "v_proj"], "input_dropout": 0.0, **changes})
    )
    torch.manual_seed(4)
    perturb(model)
    return model


def trainer(tmp_path, model, cls=MoSLDTrainer, batch=8, options=(), **changes):
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=batch, per_device_eval_batch_size=3,
        learning_rate=1.0, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, report_to="none",
        save_strategy="no", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, **dict(options),
    )  # fmt: skip
    return cls(model=model, args=arguments, **changes)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_routes_each_batch_by_its_own_column(tmp_path, accumulation, checkpointing):
    """SGD at lr 1: the step is the gradient, which all eight rows in one forward give as well."""
    model = adapted()
    before = weights(model)
    options = {"gradient_accumulation_steps": accumulation}
    if checkpointing:
        has = hasattr(TrainingArguments, "activation_checkpointing")
        options |= {"activation_checkpointing" if has else "gradient_checkpointing": True}
    trainer(tmp_path, model, batch=8 // accumulation, options=options, train_dataset=ROWS).train()
    own = adapted()
    set_routing(own, task_ids=TASKS)
    own(IDS, labels=IDS).loss.backward()
    for name, parameter in own.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(before[name] - weights(model)[name], parameter.grad, **CLOSE)
            assert parameter.grad.abs().max() > 1e-4, name


@torch.no_grad()
def test_evaluation_and_prediction_route_by_the_column_too(tmp_path):
    model = adapted().eval()
    logits = []
    for row, task in zip(IDS, TASKS, strict=True):
        set_routing(model, task_ids=task)
        logits.append(model(row[None]).logits)
    expected = torch.cat(logits)
    losses = F.cross_entropy(expected[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    set_routing(model, task_ids=6)  # what nobody wants here
    run = trainer(tmp_path, model)
    assert run.evaluate(ROWS)["eval_loss"] == pytest.approx(losses.item(), rel=1e-5)
    without_labels = [{"input_ids": row["input_ids"], "task_ids": row["task_ids"]} for row in ROWS]
    predicted = torch.from_numpy(run.predict(without_labels).predictions)
    torch.testing.assert_close(predicted, expected, **CLOSE)


def test_data_without_the_column_keeps_what_was_told_until_there_was_one(tmp_path):
    model = adapted().eval()
    rows = [{key: row[key] for key in ("input_ids", "labels")} for row in ROWS]
    run = trainer(tmp_path, model)
    with pytest.raises(RuntimeError, match="MoSLDTrainer does it with a `task_ids` column"):
        run.evaluate(rows)
    set_routing(model, task_ids=2)
    one_task = run.evaluate(rows)["eval_loss"]
    assert one_task == pytest.approx(run.evaluate([{**row, "task_ids": 2} for row in rows])["eval_loss"])
    with pytest.raises(ValueError, match="a batch has no task_ids where earlier ones had"):
        run.evaluate(rows)


def tokenizer():
    words = Tokenizer(WordLevel({"<pad>": 1, **{f"w{i}": i for i in range(2, 96)}}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")


@pytest.mark.parametrize("collator", ["default", "padding", "seq2seq"])
def test_collators_make_a_tensor_of_the_column(tmp_path, collator):
    collators = {
        "default": lambda: default_data_collator,
        "padding": lambda: DataCollatorWithPadding(tokenizer()),
        "seq2seq": lambda: DataCollatorForSeq2Seq(tokenizer()),
    }
    seen = []

    class Watching(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append(
                (set(inputs), next(m for m in model.modules() if hasattr(m, "mixtures")).mixtures["default"].routing)
            )
            return super().compute_loss(model, inputs, *args, **kwargs)

    class Mine(MoSLDTrainerMixin, Watching):
        pass

    rows = [{key: v.tolist() if key != "task_ids" else v for key, v in row.items()} for row in ROWS]
    run = trainer(tmp_path, adapted(), Mine, train_dataset=rows, data_collator=collators[collator]())
    run.train()
    ((columns, routing),) = seen
    assert "task_ids" not in columns and "labels" in columns
    order = torch.randperm(8, generator=torch.Generator().manual_seed(42))  # Trainer's sampler
    assert routing.task_ids.tolist() == torch.tensor(TASKS)[order].tolist()


def test_a_column_beside_a_method_that_has_no_tasks_does_no_harm(tmp_path):
    model = adapted("hydralora")
    run = trainer(tmp_path, model, train_dataset=ROWS)
    run.train()
    assert run.state.global_step == 1


def test_without_choice_of_experts_the_configured_balance_weight_is_0_and_a_given_one_refused(tmp_path):
    model = adapted(balance_coef=0.25)
    assert trainer(tmp_path, model).balance_coef == 0.0
    assert trainer(tmp_path, model, balance_coef=0.0).balance_coef == 0.0
    with pytest.raises(
        ValueError, match="balance_coef=0.1 has no load to balance .*: mixing='task_core' with router='task'"
    ):
        trainer(tmp_path, model, balance_coef=0.1)
    assert trainer(tmp_path, adapted("mola", balance_coef=0.25)).balance_coef == 0.25
