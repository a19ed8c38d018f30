"""Configurations as one writes them on a command line are the ones written in Python."""

import json

import peft
import pytest

from mosld import MoSLDConfig, presets
from mosld.analysis.config_text import parse_config
from tests.helpers.models import tiny_llama


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("mosld", presets.mosld()),
        ("mosld:r=8,top_k=1", presets.mosld(r=8, top_k=1)),
        ("hydralora:alpha=0.5, num_experts=5", presets.hydralora(alpha=0.5, num_experts=5)),
        ("mosld:target_modules=q_proj,v_proj,r=4", presets.mosld(target_modules=["q_proj", "v_proj"], r=4)),
        ('mosld:target_modules=["q_proj","v_proj"]', presets.mosld(target_modules=["q_proj", "v_proj"])),
        ("mosld:target_modules=all-linear", presets.mosld(target_modules="all-linear")),
        ("lora:mixing=core,r_up=3", presets.lora(mixing="core", mixing_options={"r_up": 3})),
        ("malora:r_up=16", presets.malora(mixing_options={"r_up": 16})),
        ('malora:mixing_options={"r_up": 16},r=4', presets.malora(mixing_options={"r_up": 16}, r=4)),
        (
            "mixlora_conditional:conditional=false,straight_through=False",
            presets.mixlora_conditional(mixing_options={"conditional": False, "straight_through": False}),
        ),
        ("mosld:shared=up,gate=softmax,down_std=null", presets.mosld(shared="up", gate="softmax", down_std=None)),
        (
            r'mosld:num_experts_pattern={"layers\\.1\\..*": 3, "layers\\.2\\..*": 4},r=2',
            presets.mosld(num_experts_pattern={r"layers\.1\..*": 3, r"layers\.2\..*": 4}, r=2),
        ),
        ("mosld:num_experts=8/2", presets.mosld(num_experts_pattern=presets.experts_by_depth(6, 8, 2))),
    ],
)
def test_a_preset_with_overrides(text, config):
    assert parse_config(text, depth=6) == config


def test_a_json_file_and_an_adapters_folder(tmp_path):
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"preset": "malora", "r_up": 5, "num_experts": "8/6/4/2", "top_k": 1}))
    pattern = presets.experts_by_depth(4, 8, 6, 4, 2)
    expected = presets.malora(mixing_options={"r_up": 5}, num_experts_pattern=pattern, top_k=1)
    assert parse_config(str(file), depth=4) == expected
    file.write_text(json.dumps({"r": 4, "target_modules": ["q_proj"]}))
    assert parse_config(str(file)) == MoSLDConfig(r=4, target_modules=["q_proj"])
    config = presets.mtl_lora(target_modules=["q_proj"], num_tasks=5)
    peft.get_peft_model(tiny_llama(), config).save_pretrained(str(tmp_path / "adapter"))
    saved = parse_config(str(tmp_path / "adapter"))
    assert (saved.mixture_of("x"), saved.target_modules) == (config.mixture_of("x"), {"q_proj"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("moslds:r=1", "config must be one of lora, mosld, .*, a JSON file or an adapter's folder, got 'moslds:r=1'"),
        ("FOLDER", "FOLDER' *: .* has no adapter_config.json"),
        ("mosld:", "written name=value, with commas between, got ''"),
        ("mosld:r", "written name=value, with commas between, got 'r'"),
        ("mosld:r=x", "mosld:r=x: r must be an integer of at least 1, got 'x'"),
        ("mosld:dropout=x", r"mosld:dropout=x: dropout must be in \[0, 1\], got 'x'"),
        ("mosld:r_up=3", "there is no field r_up; there are: alpha, .*, up_dropout$"),
        ("malora:rup=3", "there is no field rup; there are: alpha, .*, up_dropout, r_up$"),
        ("mosld:num_experts=8/x", "num_experts must be an integer, or several such as 8/6/4/2, got '8/x'"),
        ("mosld:num_experts=8/2", "needs a model that says how many blocks it has"),
        ("mosld:mixing=mean", "mixing must be one of expand"),
        ("LIST", "must hold an object of a configuration's fields, got list"),
        ("BROKEN", "is not JSON"),
        ("LORA", "its peft_type is 'LORA'"),
        ("PRESET", "preset must be one of lora, mosld, .* got 'mosldd'"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(text, message, tmp_path):
    contents = {"LIST": "[1]", "BROKEN": "{", "LORA": '{"peft_type": "LORA"}', "PRESET": '{"preset": "mosldd"}'}
    if text in contents:
        (tmp_path / text).write_text(contents[text])
    elif text == "FOLDER":
        (tmp_path / text).mkdir()
    if (tmp_path / text).exists():
        text = str(tmp_path / text)
    with pytest.raises(ValueError, match=message):
        parse_config(text)


@pytest.mark.parametrize(
    "name",
    ["model.layers.{}.self_attn.q_proj", "transformer.h.{}.attn.c_attn", "encoder.layer.{}.output.dense",
     "encoder.block.{}.layer.0.SelfAttention.q", "model.layers.{}.mlp.experts.0.w1", "layers.{}.q_proj"],
)  # fmt: skip
def test_experts_by_depth_are_those_of_the_blocks(name):
    config = presets.mosld(num_experts_pattern=presets.experts_by_depth(12, 8, 6, 4, 2))
    assert [config.experts_of(name.format(block)) for block in range(12)] == [8] * 3 + [6] * 3 + [4] * 3 + [2] * 3


def test_experts_by_depth_cuts_blocks_that_do_not_divide():
    config = presets.mosld(num_experts_pattern=presets.experts_by_depth(7, 5, 4, 3))
    assert [config.experts_of(f"layers.{block}.q") for block in range(7)] == [5, 5, 4, 4, 3, 3, 3]
    for experts in ((), (1, 2, 3)):
        with pytest.raises(ValueError, match="at most one for each of 2 blocks"):
            presets.experts_by_depth(2, *experts)
