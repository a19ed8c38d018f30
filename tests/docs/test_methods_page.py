"""docs/reference/methods.md is what the presets and the counts on their real modules say."""

import re

import peft
import pytest
import torch

from docs.build.method_counts import counted, settings, shown
from docs.build.methods import FORMS, PAGE, page
from mosld import presets, set_routing
from mosld.mixture.registry import MIXINGS
from tests.docs.snippets import blocks
from tests.helpers.models import tiny_llama, token_ids


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == page(), "python -m docs.build.methods writes it anew"


@pytest.mark.parametrize("setting", settings(), ids=lambda setting: setting.name)
def test_its_arithmetic_makes_its_counts(setting):
    trained = counted(setting)["trained"]
    assert eval(setting.arithmetic) == trained
    row = next(line for line in PAGE.read_text().splitlines() if line.startswith(f"| {setting.name} |"))
    assert f"{trained:,}" in row and shown(setting.arithmetic) in row


def test_what_it_says_of_the_papers_tables_is_so():
    """The printed figures are the counts with the point moved, and what it says beside them is their arithmetic."""
    text = re.sub(r"\s+", " ", PAGE.read_text())
    for printed, trained in ((0.419, 4_194_304), (1.389, 13_893_632), (2.228, 22_282_240)):
        assert int(trained * 100 / 1e6) / 1000 == printed
        assert f"{printed}B" in text and f"{trained:,}" in text
    assert f"{13_893_632 - 32 * 8 * 4096:,}" == "12,845,056" and "= 12,845,056" in text
    assert "6,738,415,616 + 13,893,632 = 6,752,309,248" in text
    assert "8,388,608 / (6,738,415,616 + 8,388,608) = 0.124 %" in text and "another 786,432" in text
    assert "MoSLD trains 69.2M, MoLA 105.6M" in text


def test_every_preset_has_a_section_a_row_and_a_cost():
    text = PAGE.read_text()
    for name in presets.PRESETS:
        assert f"\n### {name}\n" in text and f"\n| [`{name}`](#{name}) | [" in text and f"\n| `{name}` | " in text


@pytest.mark.parametrize("name", [name for name in MIXINGS if name in FORMS and name != "block"])
def test_the_shared_factors_are_those_that_do_not_grow_with_the_experts(name):
    def sizes(experts):
        options = {"num_experts": experts, "num_tasks": 3} if name == "task_core" else {"num_experts": experts}
        config = presets.mosld(mixing=name, shared="up" if name == "reduce" else "down", r=2, top_k=1, **options)
        return config.mixture_of("x").shapes(10, 10)

    few, many = sizes(4), sizes(8)
    for part, text in (("shared_a", FORMS[name].a), ("expert_b", FORMS[name].b)):
        assert (many[part] == few[part]) == ("shared" in text), text
        assert ("pool" in text or "one an expert" in text) == (many[part] != few[part]), text


def test_its_example_of_telling_a_model_runs():
    (block,) = blocks("docs/reference/methods.md", "python")
    batch, length = token_ids().shape
    names = {
        "task_ids": torch.tensor([0, 1, 2])[:batch],
        "gates": torch.full((batch, length, 4), 0.25),
        "prior": torch.full((batch, length, 6), 1 / 6),
    }
    lines = [line for line in block.text.splitlines() if line.startswith("mosld.set_routing")]
    for line, config in (
        (lines[0], presets.mtl_lora(num_tasks=3)),
        (lines[1], presets.mosld(num_experts=4, router="external", balance_coef=0.0)),
        (lines[2], presets.mor1e(r=2, mixing_options={"r_up": 3})),
    ):
        model = peft.get_peft_model(tiny_llama(), config)
        exec("import mosld\n" + line, {**names, "model": model})
        assert model(token_ids()).logits.isfinite().all()
        exec("import mosld\n" + lines[3], {"model": model})
        if "prior" not in line:
            with pytest.raises(RuntimeError, match="set_routing"):
                model(token_ids())
        set_routing(model)
    assert len(lines) == 4
