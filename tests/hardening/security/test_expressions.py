"""Expressions in an adapter_config.json that could keep Python's `re` busy for ever are refused before their use."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from mosld import MoSLDConfig, import_lora
from mosld.files.adapter_folder import AdapterFileError
from mosld.files.safe_regex import EXPRESSIONS, LISTS, MAX_LENGTH, check_expression, check_expressions
from mosld.presets import experts_by_depth
from tests.helpers.models import tiny_llama

ENDLESS = [
    "(a+)+", "(a*)*b", "(.*)*x", "(a|a)*b", "(?:ab|cd)+", "(a?){30}a{30}", "a?" * 30 + "a" * 30, ".*" * 6 + "x",
    "(?=(a+)+)b", "(a{1,30}){30}", "(?i:a+)+", "((?:x|y|xy)z)+", "(ab|a)(b|)(bc|c)(cd|d)" * 7, "(.+?)+?",
    r"(a*)(\1)*b", "((a|b)?c)*",
    r"model(\.\w+)*\.q_proj", "(?:(z)?(?(1)|)a+)+b", "(?:(?:(?:){60000}){60000}){60000}!", "(?:){60000}", ".*" * 250,
]  # fmt: skip
ENDING = [
    "q_proj", r".*\.layers\.\d+\..*\.(q|v)_proj", r"(?:.*\.)?(self_attn|mlp)\.\w+$", r"(\d|[a-f])+",
    "(layers|h)?.*", "(?:a{3}){2}", r".*\.layers\.(" + "|".join(map(str, range(80))) + r")\..*_proj", "(?<!a)b+",
    "|".join(f"model.layers.{i}" for i in range(999)),
    *experts_by_depth(126, 8, 6, 4, 2),
]  # fmt: skip
FIELDS = ["target_modules", "exclude_modules", "layers_pattern", "num_experts_pattern", "rank_pattern", "alpha_pattern"]
FIELDS_OF_PEFT = {
    own.name for config in PEFT_TYPE_TO_CONFIG_MAPPING.values() for own in fields(config)
    if own.name.endswith("_pattern") or "regex" in str(own.metadata.get("help")).lower()
}  # fmt: skip
BAD = "(a+)+"
CASES = [
    *((name, BAD) for name in EXPRESSIONS), *((name, ["fine", BAD]) for name in LISTS),
    *((name, {"fine": 1, BAD: 1}) for name in sorted(FIELDS_OF_PEFT)
      if name.endswith("_pattern") and name not in LISTS),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), CASES)
def test_whatever_peft_takes_for_an_expression_is_looked_at(name, value):
    with pytest.raises(ValueError, match=f"adapter_config.json cannot be used: {name} has .* which may take for ever"):
        check_expressions({name: value}, Path("adapter_config.json"))


def test_peft_has_no_other_fields_of_expressions():
    """As its configurations' own help tells, of every method."""
    assert {name for name in FIELDS_OF_PEFT if not name.endswith("_pattern")} <= set(EXPRESSIONS)
    assert {"rank_pattern", "n_frequency_pattern", "target_modules"} <= FIELDS_OF_PEFT


@pytest.mark.parametrize("pattern", ENDLESS[:3])
def test_modules_to_save_are_expressions_too(pattern):
    with pytest.raises(ValueError, match="modules_to_save has .* which may take for ever"):
        MoSLDConfig(modules_to_save=[pattern])


@pytest.mark.parametrize("pattern", ENDLESS, ids=lambda pattern: pattern[:20])
def test_what_may_not_end_is_refused(pattern):
    re.compile(pattern)
    with pytest.raises(ValueError, match="r has .* which may take for ever: "):
        check_expression("r", pattern, r"(.*\.)?({})$")


@pytest.mark.parametrize("pattern", ENDING, ids=lambda pattern: pattern[:20])
def test_what_names_layers_passes(pattern):
    check_expression("r", pattern, r"(.*\.)?({})$")


def test_one_of_any_length_is_not_even_parsed():
    with pytest.raises(ValueError, match=f"it has {MAX_LENGTH + 1} characters, more than {MAX_LENGTH}"):
        check_expression("r", "x" * (MAX_LENGTH + 1))


@pytest.mark.parametrize("name", FIELDS[:4])
def test_a_configuration_refuses_it(name):
    value = {"(a+)+": 1} if name.endswith("_pattern") and name != "layers_pattern" else "(a+)+"
    more = {"layers_to_transform": [0], "target_modules": ["q_proj"]} if name == "layers_pattern" else {}
    with pytest.raises(ValueError, match=f"{name} has .* which may take for ever"):
        MoSLDConfig(**{**more, name: value})


@pytest.mark.parametrize("method", ["mosld", "lora"])
@pytest.mark.parametrize("name", FIELDS)
def test_a_saved_adapter_with_one_is_refused_by_every_way_in(name, method, adapter, data, say, tmp_path):
    if method == "mosld" and name in FIELDS[4:]:
        return  # which MoSLD has not
    value = {"(a+)+": 1} if name in FIELDS[3:] else "(a+)+"
    more = {"layers_to_transform": [0]} if name == "layers_pattern" else {}
    folder, out = adapter(method, **{**more, name: value}), tmp_path / "out"
    file = f"{folder}/adapter_config.json cannot be used: "
    loading = ["--model", data / "model", "--adapter", folder, "--task", f"even={data / 'even.jsonl'}", "--output", out]
    for words in (["eval", *loading], ["merge", "--method", "ties", "--base", data / "model", folder, "--output", out]):
        status, said = say(*words)
        assert status == 2 and file in said and f"{name} has" in said and "may take for ever" in said, said
    if method == "mosld":
        status, said = say("inspect", folder)
        assert status == 2 and file in said and "may take for ever" in said
        with pytest.raises(AdapterFileError, match="may take for ever"):
            MoSLDConfig.from_pretrained(str(folder))
    else:
        with pytest.raises(ValueError, match="may take for ever"):
            import_lora(tiny_llama(vocab_size=258), folder, num_experts=2)
    assert not out.exists()
