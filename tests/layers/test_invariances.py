"""A sequence's logits depend on the sequence alone, recomputing and repeating change nothing, compiled or not."""

import peft
import pytest
import torch
import torch._dynamo.testing
import transformers
from transformers import TrainerCallback, TrainingArguments

from mosld import MoSLDConfig, MoSLDTrainer, balance_loss
from mosld.layers.adapter import MoSLDAdapter
from tests.helpers.architectures import build
from tests.helpers.models import perturb, tiny_llama, token_ids

CLOSE = dict(rtol=1e-5, atol=1e-5)


def adapted(name="Llama", **changes):
    targets = "all-linear" if name == "Llama" else ["query", "value", "dense"]
    config = dict(r=4, num_experts=4, top_k=2, dropout=0.0, target_modules=targets)
    model = peft.get_peft_model(build(name), MoSLDConfig(**{**config, **changes}))
    torch.manual_seed(1)
    perturb(model)
    return model.eval()


@pytest.mark.parametrize("name", ["Llama", "BERT"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_batch_mates_and_padding_change_nothing(name, side):
    model, ids = adapted(name), token_ids(rows=3, length=9)
    lengths = (9, 5, 2)
    batch, mask = torch.ones_like(ids), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(9 - length, None) if side == "left" else slice(0, length)
        batch[row, place], mask[row, place] = ids[row, :length], 1
    more = {}
    if side == "left":  # positions are counted from the first real token
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        more["position_ids"] = positions
    together = model(input_ids=batch, attention_mask=mask, **more).logits
    for row, length in enumerate(lengths):
        alone = model(input_ids=ids[row : row + 1, :length]).logits[0]
        if name == "Llama":
            place = slice(9 - length, None) if side == "left" else slice(0, length)
            torch.testing.assert_close(together[row, place], alone, **CLOSE)
        elif side == "right":  # BERT's pooler reads the first place
            torch.testing.assert_close(together[row], alone, **CLOSE)


@torch.no_grad()
def test_later_tokens_change_nothing_and_a_cache_neither():
    model, ids = adapted(), token_ids(rows=2, length=10)
    whole = model(ids).logits
    for length in (1, 4, 9):
        torch.testing.assert_close(model(ids[:, :length]).logits, whole[:, :length], **CLOSE)
    cached, steps = None, []
    for place in range(10):
        out = model(ids[:, place : place + 1], past_key_values=cached, use_cache=True)
        cached = out.past_key_values
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, **CLOSE)


class Losses(TrainerCallback):
    def __init__(self):
        self.losses = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            self.losses.append(logs["loss"])


def train(tmp_path, steps, resume=False):
    transformers.set_seed(7)
    model = peft.get_peft_model(tiny_llama(), MoSLDConfig(r=2, num_experts=4, dropout=0.3, target_modules="all-linear"))
    rows = [{"input_ids": row, "labels": row} for row in token_ids(rows=24, length=8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        save_steps=3, lr_scheduler_type="constant", report_to="none", use_cpu=True, disable_tqdm=True, seed=7,
        dataloader_pin_memory=False,
    )  # fmt: skip
    seen = Losses()
    trainer = MoSLDTrainer(model=model, args=arguments, train_dataset=rows, callbacks=[seen])
    trainer.train(resume_from_checkpoint=resume)
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return seen.losses, weights


def test_the_same_seed_is_the_same_run_and_resuming_goes_on_exactly(tmp_path):
    losses, weights = train(tmp_path / "whole", 6)
    again, same = train(tmp_path / "again", 6)
    assert losses == again and len(set(losses)) > 1
    first, _ = train(tmp_path / "parts", 3)
    second, resumed = train(tmp_path / "parts", 6, resume=True)
    assert first + second == losses
    for name, weight in weights.items():
        assert torch.equal(weight, same[name]) and torch.equal(weight, resumed[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["balanced", "checkpointed"])
def test_compiled_whole_with_dropout_and_dynamic_shapes_it_is_the_same(checkpointing, monkeypatch):
    # Inside a checkpoint torch.compile allows no layer to remember its logits, so there is no balance loss.
    monkeypatch.setattr(MoSLDAdapter, "keep_logits", not checkpointing)

    def run(compile_it):
        model = adapted(dropout=0.3).train()
        if checkpointing:
            base = model.get_base_model()
            enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
            # Only reentrant checkpoints need them, and torch.compile takes no such hook.
            base.disable_input_require_grads()

        def loss(ids):
            task = model(ids, labels=ids, use_cache=False).loss
            return task if checkpointing else task + 0.1 * balance_loss(model)

        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        step = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter) if compile_it else loss
        results = []
        for rows, length in ((2, 6), (3, 9), (4, 5)):
            model.zero_grad()
            torch.manual_seed(rows)
            value = step(token_ids(rows, length))
            value.backward()
            results += [value.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]
        return results, counter.frame_count

    expected, _ = run(False)
    compiled, frames = run(True)
    assert 1 <= frames <= 2  # at most one recompilation
    for ours, truth in zip(compiled, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)


def test_without_logits_there_is_no_balance_loss(monkeypatch):
    monkeypatch.setattr(MoSLDAdapter, "keep_logits", False)
    model = adapted()
    model(token_ids())
    with pytest.raises(RuntimeError, match="MoSLDAdapter.keep_logits"):
        balance_loss(model)


@pytest.mark.slow
def test_an_adapted_model_in_eval_exports():
    model, ids = adapted(), token_ids(rows=2, length=6)

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    with torch.no_grad():
        exported = torch.export.export(Logits().eval(), (ids,))
        torch.testing.assert_close(exported.module()(ids), model(ids, use_cache=False).logits, **CLOSE)
    assert any("mosld.linear" in str(node.target) for node in exported.graph.nodes)
