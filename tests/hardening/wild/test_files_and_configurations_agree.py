"""Weights are loaded into what they were trained as, nothing is written over with a pickle, and what a file must not
hold is refused by name."""

import json
import re

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainingArguments

from mosld import MoSLDConfig, MoSLDTrainer
from mosld.files.adapter_folder import AdapterFileError
from tests.helpers.models import perturb, tiny_llama, token_ids

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MIXTURE = dict(r=2, num_experts=3, dropout=0.0, target_modules=["q_proj", "v_proj"])


def adapted(name="default", **changes) -> peft.PeftModel:
    torch.manual_seed(1)
    model = peft.get_peft_model(tiny_llama(), MoSLDConfig(**{**MIXTURE, **changes}), adapter_name=name)
    perturb(model)
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=token_ids()).logits


@pytest.fixture
def saved(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"alpha": 32}, r"alpha=32 here, 16.* in the file"),
        ({"top_k": 1}, r"top_k=1 here, 2 in the file"),
        ({"gate": "softmax"}, r"gate='softmax' here, 'top_k' in the file"),
        ({"temperature": 2.0}, r"temperature=2.0 here, 1.0 in the file"),
        ({"top_k": 1, "temperature": 0.5}, r"top_k=1 here, 2 in the file; temperature=0.5 here, 1.0 in the file"),
    ],
)
def test_weights_are_not_loaded_into_another_configuration(saved, changes, words):
    model = adapted(**changes)
    before = logits(model)
    with pytest.raises(AdapterFileError, match=rf"another configuration.*{words}.*delete_adapter\('default'\)"):
        model.load_adapter(saved, "default")
    assert torch.equal(logits(model), before)


def test_the_files_configuration_wins_where_the_adapter_is_deleted_first(saved):
    model = adapted(alpha=32, top_k=1)
    model.add_adapter("other", MoSLDConfig(**MIXTURE))
    with pytest.warns(UserWarning, match="Setting active adapter to other"):
        model.delete_adapter("default")
    model.load_adapter(saved, "default")
    model.set_adapter("default")
    assert torch.equal(logits(model), logits(adapted()))


def test_what_matters_in_training_alone_may_differ(saved):
    model = adapted(dropout=0.3, balance_coef=0.5)
    perturb(model)
    model.load_adapter(saved, "default")
    assert torch.equal(logits(model), logits(adapted()))


def arguments(folder, **changes) -> TrainingArguments:
    settings = dict(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=3, use_cpu=True, report_to="none",
        save_steps=1, save_strategy="steps", disable_tqdm=True, learning_rate=0.1,
    )  # fmt: skip
    return TrainingArguments(**{**settings, **changes})


DATA = [{"input_ids": row, "labels": row} for row in token_ids()]


def test_a_run_is_not_resumed_with_another_configuration(tmp_path):
    MoSLDTrainer(adapted(), arguments(tmp_path), train_dataset=DATA).train()
    changed = MoSLDTrainer(adapted(top_k=1), arguments(tmp_path, max_steps=3), train_dataset=DATA)
    with pytest.raises(AdapterFileError, match="top_k=1 here, 2 in the file"):
        changed.train(resume_from_checkpoint=True)
    same = MoSLDTrainer(adapted(), arguments(tmp_path, max_steps=3), train_dataset=DATA)
    same.train(resume_from_checkpoint=True)
    assert same.state.global_step == 3


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_pickle_is_refused_before_anything_is_written(saved):
    """Beside an older save it would be passed over: the old weights load, under a fresh checksum."""
    before = contents(saved)
    model = adapted(r=3)
    with pytest.raises(ValueError, match="safe_serialization=False writes a pickle, which mosld never loads"):
        model.save_pretrained(saved, safe_serialization=False)
    assert contents(saved) == before
    with pytest.raises(ValueError, match="safe_serialization=False"):
        model.save_pretrained(saved / "new", safe_serialization=False)
    assert not (saved / "new").exists()


def test_other_methods_of_peft_go_through(tmp_path):
    lora = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path)
    lora.load_adapter(tmp_path, "default")
    lora.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    assert (tmp_path / "pickle" / "adapter_model.bin").is_file()


# ---- what a file must not hold


def with_tensors(folder, **tensors) -> None:
    state = load_file(folder / WEIGHTS)
    save_file({**state, **tensors}, folder / WEIGHTS)
    for file in folder.glob("*.sha256"):
        file.unlink()


@pytest.mark.parametrize("way", ["from_pretrained", "load_adapter"])
def test_a_tensor_of_the_base_is_refused_by_name(saved, way):
    """PEFT would write it into the base, and disabling the adapter would not undo it."""
    name = "model.layers.0.self_attn.o_proj.weight"
    base = tiny_llama()
    before = base.get_parameter(name).clone()
    with_tensors(saved, **{f"base_model.model.{name}": torch.zeros_like(before)})
    with pytest.raises(
        AdapterFileError, match=rf"{re.escape(name)}, which is no adapter's and none of modules_to_save"
    ):
        if way == "from_pretrained":
            peft.PeftModel.from_pretrained(base, saved)
        else:
            peft.get_peft_model(base, MoSLDConfig(**MIXTURE)).load_adapter(saved, "more")
    assert torch.equal(base.get_parameter(name.replace(".o_proj", ".o_proj")), before)


def test_announced_modules_are_loaded(tmp_path):
    model = adapted(modules_to_save=["norm"])
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(model))


def test_a_resized_vocabulary_is_loaded(tmp_path):
    base = tiny_llama()
    base.resize_token_embeddings(100)
    model = peft.get_peft_model(base, MoSLDConfig(**MIXTURE))
    perturb(model)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any("embed_tokens" in name for name in load_file(tmp_path / WEIGHTS))
    other = tiny_llama()
    other.resize_token_embeddings(100)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(other, tmp_path)), logits(model))


def test_json_without_a_method_is_no_configuration(tmp_path):
    (tmp_path / CONFIG).write_text(json.dumps({"r": 4}))
    with pytest.raises(TypeError, match=r"adapter_config.json is no configuration of an adapter: it has no peft_type"):
        MoSLDConfig.from_pretrained(tmp_path)


def test_files_of_no_size_that_a_configuration_has_are_not_read(saved):
    fields = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(json.dumps({**fields, **{f"field_{i}": i for i in range(2000)}}))
    with pytest.raises(AdapterFileError, match=r"has 2,\d\d\d fields: such a file has at most 1,000"):
        MoSLDConfig.from_pretrained(saved)
    with open(saved / CONFIG, "wb") as file:
        file.truncate(10**9)  # a file of holes
    with pytest.raises(AdapterFileError, match=r"has 1,000,000,000 bytes: such a file has at most 16,777,216"):
        MoSLDConfig.from_pretrained(saved)


# ---- names that match nothing


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts_pattern": {"q_prj": 4}}, r"num_experts_pattern names 'q_prj'.*the nearest are q_proj"),
        ({"num_experts_pattern": {r"layers\.1\.": 4}}, r"must reach the end of a layer's name"),
        ({"num_experts_pattern": {"layers.7.self_attn.q_proj": 4}}, r"the nearest are layers\.\d\.self_attn\.q_proj"),
        ({"num_experts_pattern": {"down_proj": 4}}, r"names 'down_proj', which matches none of the adapted layers"),
        ({"modules_to_save": ["lm_heads"]}, r"modules_to_save names 'lm_heads'.*the nearest are lm_head"),
        (
            {"layers_to_transform": [0, 9]},
            r"layers_to_transform names layer 9, in which nothing matches: adapted are 0",
        ),
        ({"layers_to_transform": 2}, r"layer"),
        ({"exclude_modules": ["v_porj"]}, r"exclude_modules names 'v_porj'.*the nearest are v_proj"),
        ({"exclude_modules": r"layers\.0"}, r"exclude_modules='layers.*' matches none of the modules"),
    ],
)
def test_a_name_that_matches_nothing_is_an_error_with_the_nearest(changes, words):
    base = tiny_llama()
    modules = {name for name, _ in base.named_modules()}
    with pytest.raises(ValueError, match=words):
        peft.get_peft_model(base, MoSLDConfig(**{**MIXTURE, **changes}))
    assert {name for name, _ in base.named_modules()} == modules
    assert not base._forward_pre_hooks


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts_pattern": {"q_proj": 4}},
        {"num_experts_pattern": {r".*layers\.1\..*": 4}},
        {"num_experts_pattern": {"layers.1.self_attn.q_proj": 4, "q_proj": 2}},
        {"modules_to_save": ["norm"]},
        {"layers_to_transform": [1]},
        {"exclude_modules": ["model.layers.0.self_attn.v_proj"]},
    ],
)
def test_names_that_match_are_taken(changes, tmp_path):
    model = adapted(**changes)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(model))


@pytest.mark.parametrize("name", ["v1.5", "keys", "forward"])
def test_an_adapters_name_that_no_module_can_have(name):
    base = tiny_llama()
    modules = {own for own, _ in base.named_modules()}
    with pytest.raises(ValueError, match=rf"an adapter's name .*got '{re.escape(name)}'"):
        peft.get_peft_model(base, MoSLDConfig(**MIXTURE), adapter_name=name)
    assert {own for own, _ in base.named_modules()} == modules
    model = adapted()
    before = logits(model)
    with pytest.raises(ValueError, match="an adapter's name"):
        model.add_adapter(name, MoSLDConfig(**MIXTURE))
    assert torch.equal(logits(model), before) and list(model.peft_config) == ["default"]


def test_lists_and_dictionaries_of_omegaconf():
    omegaconf = pytest.importorskip("omegaconf", reason="omegaconf, of the extra interop, is not installed")
    given = omegaconf.OmegaConf.create(
        {"target_modules": ["q_proj", "v_proj"], "num_experts_pattern": {"q_proj": 4}, "modules_to_save": ["norm"],
         "layers_to_transform": [0]}
    )  # fmt: skip
    config = MoSLDConfig(r=2, num_experts=3, **{name: given[name] for name in given})
    plain = MoSLDConfig(r=2, num_experts=3, **omegaconf.OmegaConf.to_container(given))
    assert config == plain and config.target_modules == {"q_proj", "v_proj"}
    peft.get_peft_model(tiny_llama(), config)


def test_tokens_that_are_trained_beside_the_adapter(tmp_path):
    """As TRL asks for where a chat template brings new ones."""
    model = adapted(trainable_token_indices=[5, 7])
    model.train()
    frozen = tiny_llama().get_input_embeddings().weight.detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=torch.tensor([[5, 7, 5, 9]]), labels=torch.tensor([[5, 7, 5, 9]])).loss.backward()
    optimizer.step()
    trained = [name for name, p in model.named_parameters() if p.requires_grad and "token" in name]
    assert trained
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    ids = torch.tensor([[5, 7, 9, 2]])
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
        with again.disable_adapter():
            assert torch.equal(again(input_ids=ids).logits, tiny_llama()(input_ids=ids).logits)
    assert torch.equal(tiny_llama().get_input_embeddings().weight, frozen)
    assert isinstance(model, nn.Module)


@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_the_card_takes_no_markup_from_a_base_models_name_and_a_broken_one_is_put_aside(tmp_path):
    model = adapted()
    model.peft_config["default"].base_model_name_or_path = "evil`|<script>[x](y)\n# title"
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text().partition("---\n")[2].partition("---\n")[2]
    assert "<script>" not in text and "\n# title" not in text and "evil" in text
    (tmp_path / "README.md").write_text("---\nlicense: [unclosed\n---\n# Mine\n")
    with pytest.warns(UserWarning, match=r"no model card that can be read .*README.unreadable.md now"):
        model.save_pretrained(tmp_path)
    assert "# Mine" in (tmp_path / "README.unreadable.md").read_text()
    peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
