"""What MoSLDTrainer logs of the routers is what a loop over layers, tokens and experts counts."""

import math

import peft
import pytest
import torch
from transformers import Trainer, TrainingArguments

from mosld import MoSLDConfig, MoSLDTrainer, MoSLDTrainerMixin, balance_loss
from mosld.tuner.layer import MoSLDPeftLinear
from tests.helpers.models import perturb, tiny_llama, token_ids

LENGTHS = [6, 4, 5, 6, 3, 6, 2, 6]  # of eight rows of six places; the rest is padding
MASK = torch.tensor([[1] * length + [0] * (6 - length) for length in LENGTHS])
ROWS = [
    {"input_ids": row, "labels": row, "attention_mask": mask}
    for row, mask in zip(token_ids(rows=8, length=6), MASK, strict=True)
]
KEYS = {"router/entropy", "router/max_load", "router/dead_experts", "balance_loss"}


def adapted(**changes):
    model = peft.get_peft_model(
        tiny_llama(), MoSLDConfig(**{"r": 2, "num_experts": 6, "target_modules": ["q_proj", "v_proj"], **changes})
    )
    torch.manual_seed(4)
    perturb(model)
    return model


def logged(tmp_path, model=None, trainer_class=MoSLDTrainer, steps=2, every=2, evaluates=False, **changes):
    """The log history of two steps of two micro-batches of two rows; the weights stay as they are."""
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=0.0, logging_steps=every, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False, eval_strategy="steps" if evaluates else "no", eval_steps=1,
    )  # fmt: skip
    model = adapted() if model is None else model
    trainer = trainer_class(model=model, args=arguments, train_dataset=ROWS, eval_dataset=ROWS[:3], **changes)
    trainer.train()
    return trainer.state.log_history


def routing_by_loop(rows):
    """layer -> (places of each expert, sum of entropies, tokens) of the real tokens of `rows`, counted one by one."""
    model = adapted(dropout=0.0).eval()
    ids = torch.stack([ROWS[i]["input_ids"] for i in rows])
    model(ids, attention_mask=MASK[rows])
    counted = {}
    for name, module in model.named_modules():
        if isinstance(module, MoSLDPeftLinear):
            places, entropy, tokens = [0] * 6, 0.0, 0
            for row, logits in zip(rows, module.mixtures["default"].router_logits.tolist(), strict=True):
                for token in logits[: LENGTHS[row]]:
                    total = sum(math.exp(x) for x in token)
                    entropy -= sum(math.exp(x) / total * math.log(math.exp(x) / total) for x in token)
                    for expert in sorted(range(6), key=lambda e: (-token[e], e))[:2]:
                        places[expert] += 1
                    tokens += 1
            counted[name.removeprefix("base_model.model.")] = places, entropy, tokens
    return counted


def of_layer(places, entropy, tokens):
    return {"entropy": entropy / tokens, "max_load": max(places) / sum(places), "dead_experts": places.count(0)}


def order():
    """The order in which Trainer's sampler visits eight rows: from its argument `seed`, 42 by default."""
    return torch.randperm(8, generator=torch.Generator().manual_seed(42)).tolist()


@pytest.mark.parametrize("every", [1, 2])
def test_logs_hold_what_a_loop_counts_since_the_last_log(tmp_path, every):
    # A is not read by the routers and dropout falls on A, but the second layer's input follows from it: none here.
    history = [e for e in logged(tmp_path, adapted(dropout=0.0), every=every, router_logs="layers") if "loss" in e]
    assert len(history) == 2 // every
    for entry, rows in zip(history, torch.tensor(order()).chunk(2 // every), strict=True):
        expected = {name: of_layer(*counts) for name, counts in routing_by_loop(rows.tolist()).items()}
        assert len(expected) == 4
        for name, values in expected.items():
            for key, value in values.items():
                assert entry[f"router/{name}/{key}"] == pytest.approx(value, rel=1e-5), (name, key)
        entropies, loads, dead = zip(*(values.values() for values in expected.values()), strict=True)
        assert entry["router/entropy"] == pytest.approx(sum(entropies) / 4, rel=1e-5)
        assert entry["router/max_load"] == pytest.approx(max(loads), rel=1e-6)
        assert entry["router/dead_experts"] == sum(dead)


def test_dead_experts_are_counted(tmp_path):
    model = adapted()
    for name, parameter in model.named_parameters():
        if "router" in name and "layers.0" in name:
            # Whatever the token, two of the first four are before the last two.
            parameter.data[:] = torch.tensor([[1.0], [-1], [0.5], [-0.5], [0.1], [-0.1]]) * parameter.data[0]
    entry = logged(tmp_path, model, router_logs="layers")[0]
    dead = {key: value for key, value in entry.items() if key.endswith("/dead_experts") and "layers" in key}
    assert [value for key, value in dead.items() if ".0." in key] == [2, 2]
    assert entry["router/dead_experts"] == sum(dead.values())


def test_the_logged_balance_loss_is_the_mean_over_forwards(tmp_path):
    model = adapted(dropout=0.0).eval()
    losses = []
    for rows in torch.tensor(order()).chunk(4):
        model(torch.stack([ROWS[i]["input_ids"] for i in rows]))
        with torch.no_grad():
            losses.append(balance_loss(model, MASK[rows]).item())
    entry = logged(tmp_path, adapted(dropout=0.0))[0]
    assert entry["balance_loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)
    assert "balance_loss" not in logged(tmp_path, balance_coef=0.0)[0]


def test_only_training_logs_tell_of_the_routers(tmp_path):
    history = logged(tmp_path, every=2, evaluates=True)
    assert [set(entry) >= KEYS for entry in history] == ["loss" in entry for entry in history]
    assert [key for e in history for key in ("loss", "eval_loss", "train_loss") if key in e] == [
        "eval_loss", "loss", "eval_loss", "train_loss",
    ]  # fmt: skip
    assert not any(key.startswith(("router/", "balance")) for e in history if "loss" not in e for key in e)


def test_evaluations_between_the_steps_count_for_nothing(tmp_path):
    plain, evaluated = (
        [
            {key: entry[key] for key in KEYS}
            for entry in logged(tmp_path, adapted(dropout=0.0), every=1, evaluates=e)
            if "loss" in entry
        ]
        for e in (False, True)
    )
    assert plain == evaluated


def test_evaluating_without_training_logs_nothing_of_the_routers(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True,
                                  dataloader_pin_memory=False)  # fmt: skip
    trainer = MoSLDTrainer(model=adapted(), args=arguments, eval_dataset=ROWS)
    trainer.evaluate()
    trainer.log({"loss": 1.0})
    assert not any(key.startswith("router/") for entry in trainer.state.log_history for key in entry)


def test_logging_changes_no_weight_and_can_be_turned_off(tmp_path):
    assert not KEYS & set(logged(tmp_path, router_logs="off")[0])
    losses = [logged(tmp_path, router_logs=logs)[0]["loss"] for logs in ("off", "summary", "layers")]
    assert losses[0] == losses[1] == losses[2]
    with pytest.raises(ValueError, match="router_logs must be one of summary, layers, off, got 'all'"):
        logged(tmp_path, router_logs="all")


def test_the_mixin_trains_other_methods_and_logs_as_ever(tmp_path):
    class Mine(MoSLDTrainerMixin, Trainer):
        pass

    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    entry = logged(tmp_path, model, Mine)[0]
    assert entry["loss"] > 0 and not KEYS & set(entry)


def test_two_active_adapters_of_different_sizes_are_told_apart(tmp_path):
    model = adapted()
    model.add_adapter("second", MoSLDConfig(r=2, num_experts=3, top_k=1, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    entry = logged(tmp_path, model, router_logs="layers")[0]
    names = {key.split("/")[1] for key in entry if key.startswith("router/") and key.count("/") == 2}
    first = "model.layers.0.self_attn.q_proj"
    assert len(names) == 6 and {first, f"{first} (2)"} <= names
