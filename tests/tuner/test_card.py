"""Every saved adapter has a card that says what was saved, and saving again renews that part of it alone."""

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import TrainingArguments

from mosld import MoSLDConfig, MoSLDTrainer
from mosld.tuner.card import AUTO_CLASSES, BEGIN, END, write_card
from tests.helpers.models import perturb, tiny_llama, token_ids


def adapted(base=None, **changes):
    settings = {"r": 2, "num_experts": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(tiny_llama() if base is None else base, MoSLDConfig(**{**settings, **changes}))


def table(text, head):
    """The rows of the table whose first line begins with `head`, as lists of cells."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {head} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_the_card_tells_base_method_sizes_and_how_to_load(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    base = type(tiny_llama()).from_pretrained(tmp_path / "base")
    model = adapted(base, num_experts_pattern={r"layers\.1\..*": 3}, modules_to_save=["lm_head"])
    model.save_pretrained(str(tmp_path / "adapter"))
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.library_name == "peft" and "mosld" in card.data.tags
    assert card.data.base_model == str(tmp_path / "base")
    facts = dict(table(card.text, ""))
    mixtures = {n: p.numel() for n, p in model.named_parameters() if ".mosld_" in n}
    assert facts["base model"] == f"`{tmp_path / 'base'}`" and "MOSLD" in facts["method"]
    assert facts["rank, alpha"] == "2, 16" and facts["experts per layer"] == "3 to 4"
    assert facts["experts chosen per token"] == "2" and facts["task type"] == "CAUSAL_LM"
    assert facts["parameters"] == f"{sum(mixtures.values()):,} in 4 layers"
    assert facts["saved beside the adapter"] == "`lm_head.weight` [96, 32]"
    rows = {(name.strip("`"), numbers): rest for name, numbers, *rest in table(card.text, "layer")}
    assert len(rows) == 4
    for (name, number), (sizes, experts, parameters) in rows.items():
        full = name.replace("*", number)
        layer = model.base_model.model.get_submodule(full)
        assert sizes == f"{layer.in_features} -> {layer.out_features}" and int(experts) == (3 if number == "1" else 4)
        own = sum(size for parameter, size in mixtures.items() if f".{full}." in parameter)
        assert int(parameters.replace(",", "")) == own > 0
    assert "More Information Needed" not in card.text and f"- PEFT {peft.__version__}" in card.text


def test_the_code_of_the_card_loads_the_adapter(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    model = adapted(type(tiny_llama()).from_pretrained(tmp_path / "base"))
    perturb(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    code = (tmp_path / "adapter" / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    names: dict = {}
    exec(code.replace("path/to/this/adapter", str(tmp_path / "adapter")), names)
    assert torch.equal(names["model"](token_ids()).logits, model.eval()(token_ids()).logits)
    assert code.startswith("import mosld")


def test_without_a_recorded_base_the_code_takes_the_model(tmp_path):
    model = adapted(task_type=None)
    perturb(model)
    model.save_pretrained(str(tmp_path))
    code = (tmp_path / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    names: dict = {"base_model": tiny_llama()}
    exec(code.replace("path/to/this/adapter", str(tmp_path)), names)
    assert torch.equal(names["model"](token_ids()).logits, model.eval()(token_ids()).logits)


def test_every_auto_class_exists():
    for task, name in AUTO_CLASSES.items():
        assert task in peft.TaskType.__members__ and getattr(peft, name)
    assert set(AUTO_CLASSES) == set(peft.TaskType.__members__)


def test_saving_again_renews_the_part_and_keeps_what_people_wrote(tmp_path):
    adapted(r=2).save_pretrained(str(tmp_path))
    path = tmp_path / "README.md"
    path.write_text(path.read_text() + "\n## Intended use\n\nTelling jokes.\n")
    write_card(
        tmp_path, MoSLDConfig.from_pretrained(str(tmp_path)), {"jokes": {"accuracy": 0.625, "n": 8, "chance": 0.5}}
    )
    text = path.read_text()
    assert table(text, "task") == [["jokes", "8", "62.5", "50.0"]] and "Telling jokes." in text
    adapted(r=3).save_pretrained(str(tmp_path))
    text = path.read_text()
    assert text.count(BEGIN) == text.count(END) == text.count("# MoSLD adapter") == 1
    assert dict(table(text, ""))["rank, alpha"] == "3, 16" and "Telling jokes." in text
    assert "jokes |" not in text  # the scores were those of other weights


def test_a_card_that_somebody_began_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\nWords.\n")
    adapted().save_pretrained(str(tmp_path))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit" and "# Mine\n\nWords." in card.text and BEGIN in card.text


def test_every_adapter_of_a_model_gets_its_own(tmp_path):
    model = adapted()
    model.add_adapter("second", MoSLDConfig(r=3, num_experts=2, top_k=1, target_modules=["q_proj"]))
    model.save_pretrained(str(tmp_path))
    texts = [(tmp_path / name / "README.md").read_text() for name in (".", "second")]
    assert [dict(table(text, ""))["rank, alpha"] for text in texts] == ["2, 16", "3, 16"]
    second = sum(p.numel() for name, p in model.named_parameters() if ".second." in name)
    assert table(texts[1], "layer") == [["`model.layers.*.self_attn.q_proj`", "0 to 1", "32 -> 32", "2", str(second)]]


def test_the_trainers_checkpoints_have_one(tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in token_ids()]
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=1, save_strategy="steps", save_steps=1,
                                  report_to="none", use_cpu=True, disable_tqdm=True)  # fmt: skip
    MoSLDTrainer(model=adapted(), args=arguments, train_dataset=rows).train()
    assert BEGIN in (tmp_path / "checkpoint-1" / "README.md").read_text()


def test_a_configuration_alone_gets_none_and_a_foreign_one_is_refused(tmp_path):
    MoSLDConfig().save_pretrained(tmp_path)
    assert write_card(tmp_path, MoSLDConfig()) is None and not (tmp_path / "README.md").exists()
    lora = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(str(tmp_path / "lora"))
    with pytest.raises(ValueError, match="is of no MoSLD adapter: its peft_type is 'LORA'"):
        write_card(tmp_path / "lora", MoSLDConfig())


def test_transformers_own_saving_writes_none_and_the_function_does(tmp_path):
    model = tiny_llama()
    model.add_adapter(MoSLDConfig(r=2, num_experts=4, target_modules=["q_proj"]), "mine")
    for _ in range(2):  # the second time, the configuration is saved beside the first time's weights
        model.save_pretrained(tmp_path)
        assert not (tmp_path / "README.md").exists()
    write_card(tmp_path, MoSLDConfig.from_pretrained(str(tmp_path)))
    assert table((tmp_path / "README.md").read_text(), "layer")[0][1] == "0 to 1"


def test_saving_goes_on_where_no_card_can_be_written(tmp_path):
    model = adapted()
    broken = {name: tensor[:1] for name, tensor in model.state_dict().items() if ".mosld_" in name}
    with pytest.warns(UserWarning, match="the saved adapter cannot be loaded again: .*has shape"):
        model.save_pretrained(str(tmp_path), state_dict=broken)
    assert (tmp_path / "adapter_config.json").is_file()
