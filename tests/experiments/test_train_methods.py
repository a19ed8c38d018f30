"""The methods by name: a preset's values hold unless an option is given, and options without use are refused."""

import ast
import re
from pathlib import Path

import peft
import pytest
import torch
from transformers import TrainingArguments

from mosld import MoSLDConfig, MoSLDTrainer, presets, set_routing
from mosld.experiments.methods import METHODS, Adapter, targets, task_setter
from mosld.presets import PRESETS, preset
from mosld.tasks.encode import Encoder
from mosld.tasks.examples import Example, Task
from mosld.tasks.scoring import candidates, log_likelihoods, score_tasks
from tests.helpers.models import perturb, tiny_llama, token_ids
from tests.tasks.test_scoring import TOKENIZER


@pytest.mark.parametrize("method", [name for name in METHODS if name != "lora"])
def test_a_presets_values_hold_unless_an_option_is_given(method):
    tasks = {"num_tasks": 5} if preset(method).mixture_of("").wants_tasks else {}
    common = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", **tasks}
    assert Adapter(method).config(5) == preset(method, **common)
    own = Adapter(method, {"r": 3, "alpha": 7}).config(5)
    assert own == preset(method, r=3, alpha=7, **common) and (own.r, own.alpha) == (3, 7)


def test_the_layers_are_all_linear_ones_unless_the_preset_names_others():
    assert targets("mosld", None) == targets("lora", None) == targets("lora", "all-linear") == "all-linear"
    assert targets("mixlora", None) == sorted(presets.mixlora().target_modules) and "mlp" in targets("mixlora", None)
    assert targets("mixlora", "mlp") == ["mlp"] and targets("hydralora", "q_proj,v_proj") == ["q_proj", "v_proj"]


def test_lora_is_pefts_and_has_its_own_defaults():
    config = Adapter("lora", {"r": 3}, ["q_proj"]).config(5)
    assert type(config) is peft.LoraConfig
    assert (config.r, config.lora_alpha, config.lora_dropout, config.target_modules) == (3, 16, 0.1, {"q_proj"})
    assert set(METHODS) == set(PRESETS)


@pytest.mark.parametrize(
    ("method", "option", "message"),
    [
        ("hydralora", {"top_k": 2}, "top_k=2 contradicts method 'hydralora', which does not choose the K largest"),
        ("mode", {"top_k": 2}, "top_k=2 contradicts method 'mode'"),
        ("mor1e", {"num_experts": 4}, "num_experts=4 contradicts method 'mor1e', whose sizes do not depend on it"),
        ("mtl_lora", {"balance_coef": 1e-3}, "balance_coef=0.001 contradicts method 'mtl_lora', whose tokens do not"),
        ("lora", {"num_experts": 4, "top_k": 1}, "num_experts=4, top_k=1 contradicts method 'lora'"),
        ("lora", {"dropout": 1.5}, r"dropout must be in \[0, 1\], got 1.5"),
        ("mola", {"top_k": 9}, r"top_k must be in \[1, num_experts=8\], got 9"),
        ("nola", {}, "method must be one of mosld, lora, mosl, "),
    ],
)
def test_an_option_without_use_is_refused(method, option, message):
    with pytest.raises(ValueError, match=message):
        Adapter(method, option).config(2)


@pytest.mark.parametrize(
    ("method", "option"),
    [
        ("hydralora", {"num_experts": 5}),
        ("mtl_lora", {"num_experts": 5}),
        ("hydralora", {"balance_coef": 0.1}),
        ("mtl_lora", {"balance_coef": 0.0}),
        ("malora", {"top_k": 3}),
    ],
)
def test_an_option_with_use_is_taken(method, option):
    ((name, value),) = option.items()
    assert getattr(Adapter(method, option).config(2), name) == value


def routed(method="mtl_lora"):
    torch.manual_seed(3)
    model = peft.get_peft_model(
        tiny_llama(vocab_size=len(TOKENIZER)), preset(method, num_tasks=2, target_modules=["v_proj"])
    )
    perturb(model)
    return model


def test_the_trainer_gives_task_ids_to_the_routing_and_not_to_the_model(tmp_path):
    """One SGD step at lr 1 moves the parameters by the gradient of a forward that was told the tasks by hand."""
    ids, tasks = token_ids(rows=4, length=6), [0, 1, 1, 0]
    rows = [{"input_ids": row, "labels": row, "task_ids": task} for row, task in zip(ids, tasks, strict=True)]
    by_hand, model = routed("moelora_medical"), routed("moelora_medical")
    for adapted in (by_hand, model):
        for config in adapted.peft_config.values():
            assert config.num_tasks == 2
        for module in adapted.modules():
            if hasattr(module, "mixture"):
                module.eval()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, learning_rate=1.0, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=0.0, report_to="none", save_strategy="no", use_cpu=True,
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    _without_dropout(by_hand), _without_dropout(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    MoSLDTrainer(model=model, args=arguments, train_dataset=rows).train()
    set_routing(by_hand, task_ids=tasks)
    by_hand(input_ids=ids, labels=ids).loss.backward()
    largest = 0.0
    for name, parameter in by_hand.named_parameters():
        if parameter.requires_grad:
            moved = before[name] - dict(model.named_parameters())[name].detach()
            torch.testing.assert_close(moved, parameter.grad, rtol=1e-3, atol=1e-5)
            largest = max(largest, parameter.grad.abs().max().item())
    assert largest > 1e-2


def _without_dropout(model) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def test_scoring_tells_the_model_each_tasks_place():
    model, encoder = routed(), Encoder(TOKENIZER, 64)
    examples = [Example.multiple_choice(f"{i}?", ["ab", "cd", "xyz"], i % 3) for i in range(30)]
    tasks = [Task("a", [], examples), Task("b", [], examples)]
    mixture = model.peft_config["default"].mixture_of("")
    scores = score_tasks(model, encoder, tasks, on_task=task_setter(model, tasks, mixture))
    expected = []
    for place in (0, 1):
        set_routing(model, task_ids=place)
        pairs = [encoder.pair(e.prompt, text) for e in examples for text in candidates(e)]
        sums = [total for total, _ in log_likelihoods(model, pairs, encoder.pad)]
        best = [max(range(3), key=sums[3 * i : 3 * i + 3].__getitem__) for i in range(30)]
        expected.append("".join("01"[b == e.answer] for b, e in zip(best, examples, strict=True)))
    assert [scores["a"].right, scores["b"].right] == expected and expected[0] != expected[1]
    assert scores["a"].accuracy == expected[0].count("1") / 30 and "right" not in scores["a"].summary()


def test_another_number_of_tasks_than_was_trained_on_is_refused():
    mixture = preset("mtl_lora", num_tasks=3).mixture_of("")
    with pytest.raises(ValueError, match="knows num_tasks=3 of them, got 2: give the tasks that it was trained on"):
        task_setter(torch.nn.Module(), [Task("a", []), Task("b", [])], mixture)
    assert task_setter(torch.nn.Module(), [], MoSLDConfig().mixture_of("")) is None


def _pattern_in(text: str) -> dict[str, int]:
    return ast.literal_eval(re.search(r"\{r\"layers.*?\d\}", text, flags=re.DOTALL)[0])


def test_the_documented_patterns_of_experts_match_the_layers_that_they_mean():
    (told,) = re.findall(r"presets\.(experts_by_depth\(.*?\))", PRESETS["mosld"].__doc__)
    paper = MoSLDConfig(num_experts=5, num_experts_pattern=eval(told, vars(presets)))
    counts = [paper.experts_of(f"model.layers.{i}.self_attn.q_proj") for i in range(32)]
    assert counts == [8] * 8 + [6] * 8 + [4] * 8 + [2] * 8
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    config = MoSLDConfig(num_experts_pattern=_pattern_in(readme))
    assert [config.experts_of(f"model.layers.{i}.mlp.up_proj") for i in (0, 7, 8, 17)] == [4, 4, 8, 8]
