"""Loading a saved adapter: what is damaged, foreign or of other sizes is refused by name, before anything is built."""

import hashlib
import json
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import mosld
from mosld import MoSLDConfig
from mosld.analysis.saved_adapters import inspect_adapter
from mosld.files.adapter_folder import AdapterFileError, check_digest, write_digest
from mosld.mixture.spec import Mixture
from mosld.tuner.layer import MoSLDPeftLinear
from mosld.tuner.weights import AdapterWeights
from tests.helpers.models import perturb, tiny_llama, token_ids

WEIGHTS, DIGEST = "adapter_model.safetensors", "adapter_model.sha256"


@pytest.fixture
def saved(tmp_path):
    """Two layers of q and v, four experts in the first and three in the second."""
    config = MoSLDConfig(
        r=2, num_experts=4, num_experts_pattern={r"layers\.1\..*": 3}, target_modules=["q_proj", "v_proj"]
    )
    model = peft.get_peft_model(tiny_llama(), config)
    perturb(model)
    model.save_pretrained(str(tmp_path))
    return tmp_path


def change_config(folder, **changes):
    """As one does who changes it on purpose."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    (folder / DIGEST).unlink(missing_ok=True)


def change_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def load(folder, **sizes):
    return PeftModel.from_pretrained(tiny_llama(**sizes), str(folder))


def test_sizes_are_those_of_the_tensors_in_the_models_order(tmp_path):
    model = peft.get_peft_model(
        nn.Sequential(*[nn.Linear(5, 5 + i) if i == 0 else nn.Linear(4 + i, 5 + i) for i in range(12)]),
        MoSLDConfig(r=2, num_experts=3, target_modules=["0", "2", "11"]),
    )
    model.save_pretrained(str(tmp_path))
    weights = AdapterWeights(tmp_path / WEIGHTS, lambda name: Mixture(r=2, num_experts=3))
    assert list(weights.layers) == ["0", "2", "11"]
    for name, layer in weights.layers.items():
        tensors = weights.tensors(name)
        own = model.base_model.model.get_submodule(name).mixtures["default"]
        assert tensors.keys() == {"shared_a", "expert_b", "router"}
        assert all(torch.equal(read, getattr(own, part).weight) for part, read in tensors.items())
        assert layer.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert sum(layer.parameters for layer in weights.layers.values()) == model.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data[:5],
        lambda data: b"",
        lambda data: data + b"\0",
        lambda data: data[:8] + b"x" + data[9:],
        lambda data: b"\x80\x02}q\x00." + data,
    ],
    ids=["one byte short", "half", "no header", "empty", "longer", "header", "pickle"],
)
def test_a_damaged_file_is_refused_by_name_and_nothing_is_built(saved, damage):
    path = saved / WEIGHTS
    path.write_bytes(damage(path.read_bytes()))
    base = tiny_llama()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with pytest.raises(AdapterFileError, match="is cut off, altered or no safetensors file") as caught:
        PeftModel.from_pretrained(base, str(saved))
    assert str(path) in str(caught.value)
    assert not any(isinstance(module, MoSLDPeftLinear) for module in base.modules())
    assert before.keys() == base.state_dict().keys()
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in before.items())


def alter(path):
    """Change one number in the file, which stays as long as it was and has the same names and sizes."""
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


def test_a_changed_number_is_refused_by_name_and_nothing_is_built(saved):
    alter(saved / WEIGHTS)
    for load_it in (PeftModel.from_pretrained, lambda base, folder: MoSLDConfig.from_pretrained(folder)):
        base = tiny_llama()
        with pytest.raises(AdapterFileError, match="its numbers were altered") as caught:
            load_it(base, str(saved))
        assert str(saved / WEIGHTS) in str(caught.value) and f"delete {saved / DIGEST}" in str(caught.value)
        assert not any(isinstance(module, MoSLDPeftLinear) for module in base.modules())
    with pytest.raises(AdapterFileError, match="its numbers were altered"):
        inspect_adapter(saved)
    model = adapt(["q_proj"])
    with pytest.raises(AdapterFileError, match="its numbers were altered"):
        model.load_adapter(str(saved), "second")
    assert list(model.peft_config) == ["default"]
    (saved / DIGEST).unlink()  # as the message says
    load(saved)


def test_the_checksum_is_of_the_whole_file_however_long(tmp_path):
    save_file({"w": torch.zeros(3, 1 << 20, dtype=torch.uint8)}, tmp_path / WEIGHTS)
    write_digest(tmp_path)
    check_digest(tmp_path / WEIGHTS)
    data = bytearray((tmp_path / WEIGHTS).read_bytes())
    for place in (1 << 19, 3 << 19, len(data) - 1):
        data[place] ^= 1
        (tmp_path / WEIGHTS).write_bytes(data)
        with pytest.raises(AdapterFileError, match="its numbers were altered"):
            check_digest(tmp_path / WEIGHTS)
        data[place] ^= 1


def test_the_checksum_is_one_that_sha256sum_checks(saved):
    of_weights, of_config = (saved / DIGEST).read_text().splitlines()
    assert of_weights == f"{hashlib.sha256((saved / WEIGHTS).read_bytes()).hexdigest()}  {WEIGHTS}"
    assert of_config.startswith("# ") and of_config.endswith("  adapter_config.json")  # a comment
    if program := shutil.which("sha256sum"):
        subprocess.run([program, "--check", "--strict", DIGEST], cwd=saved, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        (lambda digest: digest.replace("  ", " *"), False),  # as sha256sum writes on Windows
        (lambda digest: f"{'0' * 64}  adapter_config.json\n{digest}", False),
        (lambda digest: "", True),
        (lambda digest: digest.replace("model", "other"), True),
    ],
    ids=["binary", "two files", "empty", "other file"],
)
def test_other_forms_of_the_checksum(saved, change, refused):
    (saved / DIGEST).write_text(change((saved / DIGEST).read_text()))
    if refused:
        with pytest.raises(AdapterFileError, match=f"holds no checksum of {WEIGHTS}: delete it") as caught:
            load(saved)
        assert str(saved / DIGEST) in str(caught.value)
        (saved / DIGEST).unlink()
    load(saved)
    alter(saved / WEIGHTS)
    if not refused:
        with pytest.raises(AdapterFileError, match="its numbers were altered"):
            load(saved)


def test_saving_again_renews_the_checksum_of_each_adapter(saved):
    model = load(saved)
    model.add_adapter("second", MoSLDConfig(r=2, num_experts=4, target_modules=["q_proj"]))
    for parameter in model.parameters():
        parameter.data += 0.5
    before = (saved / DIGEST).read_text()
    model.save_pretrained(str(saved))
    assert (saved / DIGEST).read_text() != before
    for folder in (saved, saved / "second"):
        load(folder)
        alter(folder / WEIGHTS)
        with pytest.raises(AdapterFileError, match="its numbers were altered"):
            load(folder)


def test_transformers_own_save_leaves_no_checksum_of_other_weights(saved):
    model = tiny_llama()
    model.add_adapter(MoSLDConfig(r=2, num_experts=4, target_modules=["q_proj", "v_proj"]))
    perturb(model)
    model.save_pretrained(saved)  # the configuration before the weights
    assert not (saved / DIGEST).exists()
    with torch.no_grad():
        assert torch.equal(load(saved)(token_ids()).logits, model.eval()(token_ids()).logits)


def test_several_that_save_the_same_adapter_at_once_leave_it_whole(saved):
    """As in a script under torchrun that lets every process save; threads come in each other's way as well."""
    configs = [MoSLDConfig.from_pretrained(str(saved)) for _ in range(4)]

    def save_often(config):
        for _ in range(20):
            save_file(load_file(saved / WEIGHTS), saved / WEIGHTS, metadata={"format": "pt"})
            config.save_pretrained(saved, auto_mapping_dict=None)  # what PEFT does after the weights

    with ThreadPoolExecutor(len(configs)) as threads:
        list(threads.map(save_often, configs))  # raises what they raise
    load(saved)
    assert (saved / DIGEST).is_file() and not list(saved.glob(".*"))


def test_a_second_adapter_that_is_damaged_leaves_the_first_as_it_is(saved):
    model = load(saved)
    ids = token_ids()
    expected = model(ids).logits
    (saved / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes()[:-1])
    with pytest.raises(AdapterFileError, match=WEIGHTS):
        model.load_adapter(str(saved), "second")
    assert list(model.peft_config) == ["default"] and torch.equal(model(ids).logits, expected)


def test_altered_weights_are_refused_with_the_layer(saved):
    first = "base_model.model.model.layers.0.self_attn.q_proj.mosld_"
    change_weights(saved, lambda tensors: tensors.pop(f"{first}router.weight"))
    with pytest.raises(AdapterFileError, match=r"was altered: model.layers.0.self_attn.q_proj lacks mosld_router") as e:
        load(saved)
    assert str(saved / WEIGHTS) in str(e.value)
    change_weights(saved, lambda tensors: tensors.update({f"{first}router.weight": torch.zeros(4, 31)}))
    with pytest.raises(AdapterFileError, match=r"mosld_router of model.layers.0.* has shape \[4, 31\] .* \[4, 32\]"):
        load(saved)
    change_weights(saved, lambda tensors: [tensors.pop(name) for name in list(tensors)[1:]])
    change_weights(saved, lambda tensors: tensors.update(other=tensors.popitem()[1]))
    with pytest.raises(AdapterFileError, match="holds no tensor of a MoSLD adapter"):
        load(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 4}, r"mosld_shared_a of model.layers.0.self_attn.q_proj has shape \[2, 32\] .* make \[4, 32\]"),
        ({"num_experts": 5}, r"mosld_expert_b of model.layers.0.self_attn.q_proj has shape \[32, 8\] .* \[32, 10\]"),
        ({"num_experts_pattern": {}}, r"mosld_expert_b of model.layers.1.self_attn.q_proj has shape \[32, 6\]"),
    ],
)
def test_a_configuration_of_another_adapter_is_refused(saved, changes, message):
    change_config(saved, **changes)
    with pytest.raises(AdapterFileError, match=message):
        load(saved)


def test_a_base_of_other_sizes_is_refused_with_the_first_layer_and_both_shapes(saved):
    with pytest.raises(
        ValueError, match="32 -> 32 features in model.layers.0.self_attn.q_proj, which has 64 -> 64 here"
    ):
        load(saved, hidden_size=64)
    with pytest.raises(ValueError, match="32 -> 16 features in model.layers.0.self_attn.v_proj, which has 32 -> 32"):
        load(saved, num_key_value_heads=4)


def test_a_base_with_fewer_layers_is_refused_with_the_layer(saved):
    model = tiny_llama(num_hidden_layers=1)
    with pytest.raises(ValueError, match="was trained for model.layers.1.self_attn.q_proj, which is not here"):
        PeftModel.from_pretrained(model, str(saved))
    assert not any(p.any() for name, p in model.named_parameters() if "expert_b" in name)  # nothing was loaded


def test_wrapped_layers_are_the_same_layers(saved):
    """Activation checkpointing's wrapper changes modules' names and leaves the keys of the state as they were."""
    model = load(saved)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers = model.base_model.model.model.layers
    layers[0] = checkpoint_wrapper(layers[0])
    perturb(model)
    model.load_state_dict(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_fields_of_a_newer_version_are_named_and_left_out(saved):
    expected = load(saved)(token_ids()).logits
    change_config(saved, router_noise=0.5, another_field=None)
    with pytest.warns(UserWarning, match="does not know and leaves out: another_field, router_noise"):
        model = load(saved)
    assert torch.equal(model(token_ids()).logits, expected)


def test_values_of_a_newer_version_are_refused(saved):
    change_config(saved, shared="sideways")
    with pytest.raises(ValueError, match="shared must be 'down' or 'up', got 'sideways'"):
        load(saved)


def adapt(targets, **more):
    return peft.get_peft_model(tiny_llama(), MoSLDConfig(target_modules=targets, **more))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_porj"], "no module is called 'q_porj', the nearest are q_proj"),
        (["self_atn.q_proj"], "no module is called 'self_atn.q_proj', the nearest are self_attn.q_proj"),
        (["zzz"], "no module is called 'zzz', there are q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj"),
        (["q_porj", "v_porj"], "'q_porj', the nearest are q_proj.*; no module is called 'v_porj', the nearest are v_"),
        ("q_proj", "expression 'q_proj' matches none of the modules, such as model.layers.0.self_attn.q_proj"),
    ],
)
def test_names_that_match_nothing_come_with_the_nearest(targets, message):
    with pytest.raises(ValueError, match=f"not found in the base model.*{message}"):
        adapt(targets)


def test_one_name_of_several_that_matches_nothing_is_a_warning():
    with pytest.warns(UserWarning, match="some of target_modules match nothing: no module is called 'v_porj'"):
        model = adapt(["q_proj", "v_porj"])
    assert sum(isinstance(module, MoSLDPeftLinear) for module in model.modules()) == 2


def test_names_that_match_bring_no_hint_when_something_else_is_wrong():
    with pytest.raises(ValueError, match="layers_to_transform") as caught:
        adapt(["q_proj"], layers_to_transform=[9])
    assert "nearest" not in str(caught.value)
    with pytest.raises(ValueError, match="embed_tokens is a Embedding$"):
        adapt(["embed_tokens"])


def test_a_second_adapter_finds_its_layers_and_is_not_warned_of():
    model = adapt(["q_proj"])
    model.add_adapter("second", MoSLDConfig(target_modules=["q_proj", "v_proj"]))
    layers = [module for module in model.modules() if isinstance(module, MoSLDPeftLinear)]
    assert sum("second" in layer.mixtures for layer in layers) == 4
    assert isinstance(model.peft_config["second"], mosld.MoSLDConfig)
