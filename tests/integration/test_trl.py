"""TRL's SFTTrainer takes a MoSLDConfig; MoSLDTrainerMixin adds the balance loss to its loss, and nothing else."""

import importlib.metadata
import importlib.util
import json

import peft
import pytest
import torch
from packaging.version import Version

from mosld import MoSLDConfig, MoSLDTrainerMixin, balance_loss
from tests.helpers.models import perturb, tiny_llama, token_ids
from tests.tasks.test_scoring import byte_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:balance_coef=.* asks for a balance loss"),  # TRL's own stands beside ours
    pytest.mark.skipif(not importlib.util.find_spec("trl"), reason="TRL is not installed: extra `trl`"),
    pytest.mark.usefixtures("offline"),
    # TRL sets what transformers renames.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing(_kwargs)?` is deprecated:FutureWarning"),
]
OLD = bool(importlib.util.find_spec("trl")) and Version(importlib.metadata.version("trl")) < Version("1.15")
TOKENIZER = byte_tokenizer()
COEF = 0.5
LENGTHS = (3, 7, 5, 7, 2, 6, 7, 4)  # so that there is padding
ROWS = [{"input_ids": row[:length].tolist()} for row, length in zip(token_ids(8, 7), LENGTHS, strict=True)]


def base():
    # Wider than LLaMA's own beginning, whose logits are so even that no adapter could move the loss by much.
    return tiny_llama(vocab_size=len(TOKENIZER), initializer_range=0.2)


def sft_trainer(folder, rows, balanced=True, model=None, arguments=(), **changes):
    """TRL's trainer, `balanced` with the mixin before it, on rows that were tokenised or have a `text`."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class MoSLDSFTTrainer(MoSLDTrainerMixin, SFTTrainer):
        pass

    settings = dict(
        output_dir=str(folder), report_to="none", save_strategy="no", logging_steps=1, use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False, bf16=False,
    )  # fmt: skip
    return (MoSLDSFTTrainer if balanced else SFTTrainer)(
        model=model or base(), args=SFTConfig(**{**settings, **dict(arguments)}), train_dataset=Dataset.from_list(rows),
        processing_class=TOKENIZER, **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def ten_steps(tmp_path_factory):
    """A trainer after ten steps with `peft_config`, and what its model held before."""
    folder = tmp_path_factory.mktemp("sft")
    trainer = sft_trainer(
        folder, [{"text": "to be or not to be"}, {"text": "to be"}] * 4, balanced=False,
        arguments=dict(
            max_steps=10, per_device_train_batch_size=4, learning_rate=2e-2, save_strategy="steps", save_steps=10
        ),
        peft_config=MoSLDConfig(r=4, num_experts=4, target_modules=["q_proj", "v_proj", "down_proj"]),
    )  # fmt: skip
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    return trainer, before, folder


def test_trl_trains_ten_steps_and_changes_the_adapter_alone(ten_steps):
    trainer, before, _ = ten_steps
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 10 and all(0 < loss < 10 for loss in losses)
    assert losses[-1] < 0.6 * losses[0]
    after = dict(trainer.model.named_parameters())
    for name, parameter in base().named_parameters():  # the frozen base, bit for bit
        wrapped = f"base_model.model.{name}"
        own = wrapped if wrapped in after else wrapped.removesuffix("weight") + "base_layer.weight"
        assert torch.equal(after.pop(own), parameter), name
    assert len(after) == 2 * 3 * 3 and all(".mosld_" in name for name in after)
    assert not any(torch.equal(parameter, before[name]) for name, parameter in after.items())


@torch.no_grad()
def test_the_adapter_that_trl_saves_loads_and_computes_the_same(ten_steps, tmp_path):
    trainer, _, folder = ten_steps
    trainer.save_model(str(tmp_path))
    ids = token_ids(vocabulary=len(TOKENIZER))
    expected = trainer.model.eval()(ids).logits
    for saved in (tmp_path, folder / "checkpoint-10"):
        assert json.loads((saved / "adapter_config.json").read_text())["peft_type"] == "MOSLD"
        assert torch.equal(peft.PeftModel.from_pretrained(base(), str(saved)).eval()(ids).logits, expected)
    assert not torch.allclose(base()(ids).logits, expected, atol=0.1)


def adapted():
    model = peft.get_peft_model(
        base(), MoSLDConfig(r=2, num_experts=4, dropout=0.0, balance_coef=COEF, target_modules=["q_proj", "v_proj"])
    )
    torch.manual_seed(4)
    perturb(model)
    return model


def one_step(folder, balanced, accumulation=1, **arguments):
    """Router weights after one SGD step of lr 1 on all eight rows, and the log of that step."""
    model = adapted()
    settings = dict(
        max_steps=1, per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation,
        learning_rate=1.0, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0,
    )  # fmt: skip
    trainer = sft_trainer(folder, ROWS, balanced, model, {**settings, **arguments})
    trainer.train()
    weights = torch.cat([p.detach().flatten() for n, p in trainer.model.named_parameters() if "router" in n])
    return weights, trainer.state.log_history[0]


def penalty_by_hand(accumulation):
    """COEF times the gradient of the balance loss of real tokens, in the mean over micro-batches; and that loss."""
    model = adapted().train()
    routers = [p for n, p in model.named_parameters() if "router" in n]
    order = torch.randperm(8, generator=torch.Generator().manual_seed(42))  # Trainer's, of its argument `seed`
    losses = []
    for part in order.chunk(accumulation):
        rows = [torch.tensor(ROWS[i]["input_ids"]) for i in part]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        model(ids, attention_mask=mask)
        losses.append(balance_loss(model, mask))
        (COEF * losses[-1] / accumulation).backward()
    return torch.cat([p.grad.flatten() for p in routers]), sum(losses).item() / accumulation


CHECKPOINTING = {
    "off": {"gradient_checkpointing": False},
    "TRL's own": {},
    "reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
}
OTHERS = [name for name in CHECKPOINTING if name != "TRL's own"]


@pytest.mark.parametrize("checkpointing", ["TRL's own", *(pytest.param(o, marks=pytest.mark.slow) for o in OTHERS)])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_mixin_adds_the_balance_loss_to_trls_and_nothing_else(tmp_path, accumulation, checkpointing):
    """With SGD at lr 1 the difference between the two trainers' weights is the penalty's gradient."""
    plain, own_log = one_step(tmp_path, False, accumulation, **CHECKPOINTING[checkpointing])
    balanced, log = one_step(tmp_path, True, accumulation, **CHECKPOINTING[checkpointing])
    gradient, loss = penalty_by_hand(accumulation)
    torch.testing.assert_close(plain - balanced, gradient, rtol=1e-4, atol=1e-6)
    assert gradient.abs().max() > 1e-2
    assert log["balance_loss"] == pytest.approx(loss, rel=1e-5)
    assert log["loss"] - own_log["loss"] == pytest.approx(COEF * loss, rel=1e-4)
    for name in ("entropy", "mean_token_accuracy", "num_tokens"):  # TRL's own metrics
        assert log[name] == own_log[name]
    assert {"router/entropy", "router/max_load", "router/dead_experts"} <= set(log)


@pytest.mark.slow
@pytest.mark.skipif(OLD, reason="in TRL before 1.15 label smoothing fails by itself")
@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's, of a forward without gradients
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_trls_second_forward_for_its_metrics_does_not_count(tmp_path, checkpointing):
    """With label smoothing TRL runs the model again without gradients, after the loss."""
    arguments = dict(label_smoothing_factor=0.1, **CHECKPOINTING[checkpointing])
    plain, balanced = (one_step(tmp_path, mixin, 2, **arguments)[0] for mixin in (False, True))
    torch.testing.assert_close(plain - balanced, penalty_by_hand(2)[0], rtol=1e-4, atol=1e-6)


def test_trls_evaluation_loss_is_its_own(tmp_path):
    from datasets import Dataset

    losses = []
    for balanced in (False, True):
        trainer = sft_trainer(tmp_path, ROWS, balanced, adapted(), eval_dataset=Dataset.from_list(ROWS))
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == losses[1]
