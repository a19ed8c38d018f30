"""A configuration is what its JSON says, whichever way it is written and read; what is unusable is refused by name."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import peft
import pytest
from hypothesis import strategies as st

from mosld import MoSLDConfig
from mosld.analysis.config_text import parse_config
from mosld.presets import PRESETS
from tests.hardening.properties.configurations import LAYERS, WRONG, configurations
from tests.hardening.properties.profile import cases

CONFIG = "adapter_config.json"
OWN = {field.name for field in fields(MoSLDConfig)} - {field.name for field in fields(peft.PeftConfig)}
UNKNOWN = st.dictionaries(
    st.text("abcdefghij_", min_size=3, max_size=12).map(lambda name: f"{name}_of_tomorrow"),
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.lists(st.integers(), max_size=2),
    min_size=1,
    max_size=3,
)


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def as_json(config: MoSLDConfig) -> str:
    return json.dumps(asdict(config), default=sorted)  # target_modules are a set


def same(found: peft.PeftConfig, config: MoSLDConfig) -> None:
    assert type(found) is MoSLDConfig and found == config
    assert all(type(getattr(found, name)) is type(getattr(config, name)) for name in OWN)
    assert [found.mixture_of(layer) for layer in LAYERS] == [config.mixture_of(layer) for layer in LAYERS]


@cases(150, drawn=configurations())
def test_json_and_back_is_the_same_configuration(folder, drawn):
    _, _, config = drawn
    config.save_pretrained(str(folder))
    for read in (MoSLDConfig.from_pretrained, peft.PeftConfig.from_pretrained, parse_config):
        same(read(str(folder)), config)
    same(parse_config(str(folder / CONFIG)), config)
    same(MoSLDConfig(**json.loads(as_json(config))), config)


@cases(100, drawn=configurations())
def test_a_preset_and_its_fields_as_text_are_the_same_configuration(folder, drawn):
    name, own, config = drawn
    path = folder / "settings.json"
    path.write_text(json.dumps({"preset": name, **own}))
    same(parse_config(str(path)), config)
    pairs = ",".join(f"{field}={json.dumps(value)}" for field, value in own.items())
    same(parse_config(f"{name}:{pairs}" if pairs else name), config)


def test_every_field_of_its_own_has_values_that_are_refused():
    assert WRONG.keys() == OWN


def wrong_values(of: Callable[[Any], bool] = lambda value: True) -> st.SearchStrategy[tuple[str, Any]]:
    return st.sampled_from(sorted(WRONG)).flatmap(
        lambda name: st.tuples(st.just(name), st.sampled_from([value for value in WRONG[name] if of(value)]))
    )


def in_json(value: Any) -> bool:
    """JSON has no complex numbers, and no keys but strings."""
    try:
        return repr(json.loads(json.dumps(value))) == repr(value)
    except TypeError:
        return False


def named(error: ValueError, field: str, value: object) -> None:
    """The field, and the value or, of several in one, that which is wrong."""
    inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    message = str(error)
    assert field in message
    assert any(repr(one) in message or str(one) in message for one in (value, *inner)), message


@cases(200, drawn=configurations(), wrong=wrong_values())
def test_a_value_that_cannot_be_used_is_refused_with_field_and_value(folder, drawn, wrong):
    preset, own, _ = drawn
    field, value = wrong
    with pytest.raises(ValueError) as caught:
        PRESETS[preset](**{**own, field: value})
    named(caught.value, field, value)


@cases(200, drawn=configurations(), wrong=wrong_values(in_json))
def test_a_file_with_such_a_value_is_refused_by_name(folder, drawn, wrong):
    _, _, config = drawn
    field, value = wrong
    text = json.dumps({**json.loads(as_json(config)), field: value})
    (folder / CONFIG).write_text(text)
    for read in (MoSLDConfig.from_pretrained, parse_config):
        with pytest.raises(ValueError) as caught:
            read(str(folder))
        named(caught.value, field, value)
        assert str(folder / CONFIG) in str(caught.value)
    with pytest.raises(ValueError) as caught:
        peft.PeftConfig.from_pretrained(str(folder))  # PEFT's own reader, which does not say where it reads
    named(caught.value, field, value)


@cases(60, drawn=configurations(), unknown=UNKNOWN)
def test_fields_of_a_newer_version_are_named_and_left_out(folder, drawn, unknown):
    _, _, config = drawn
    (folder / CONFIG).write_text(json.dumps({**json.loads(as_json(config)), **unknown}))
    with pytest.warns(UserWarning, match="does not know and leaves out: ") as caught:
        found = MoSLDConfig.from_pretrained(str(folder))
    same(found, config)
    assert [str(one.message).partition("leaves out: ")[2].partition(". A newer")[0] for one in caught] == [
        ", ".join(sorted(unknown))
    ]
    with pytest.raises(ValueError, match="there is no field ") as error:
        parse_config(str(folder))
    assert str(folder / CONFIG) in str(error.value) and ", ".join(sorted(unknown)) in str(error.value)
