"""What the README and the pages of docs/ show runs: Python as it stands, commands as far as they can be parsed."""

import functools
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from mosld import MoSLDConfig
from mosld.tasks.encode import Encoder
from mosld.tasks.examples import Example, Task, read_examples
from mosld.tasks.scoring import score_tasks
from tests.docs.snippets import FENCE, PAGES, ROOT, Block, blocks, fault, mentioned, text_of
from tests.helpers.models import perturb, tiny_llama, token_ids
from tests.tasks.test_scoring import byte_tokenizer

# Pages whose Python is run, from its text, by tests that look closer.
ELSEWHERE = {
    "docs/tutorials/new_mixing.md": "tests/mixture/test_new_mixing.py",
    "docs/tutorials/new_router.md": "tests/mixture/test_new_router.py",
    "docs/reference/methods.md": "tests/docs/test_methods_page.py",
}
LANGUAGES = {"python", "sh", "json", "text", ""}  # the last two are what something prints


def _needs(library: str, extra: str) -> pytest.MarkDecorator:
    is_missing = importlib.util.find_spec(library) is None
    return pytest.mark.skipif(is_missing, reason=f"{library} is not installed: extra `{extra}`")


needs = {"lm_eval": _needs("lm_eval", "eval"), "trl": _needs("trl", "trl")}


def nothing(names: dict) -> None:
    """Of blocks that need nothing, or that leave nothing to look at but that they ran."""


class Reader(NamedTuple):
    """What a reader has before a block, known by a text that it alone contains, and what must hold after it."""

    text: str
    before: Callable[[dict], None] = nothing
    after: Callable[[dict], None] = nothing
    needs: str = ""  # a library that is no requirement: such blocks have tests of their own


def _has_a_model(names: dict) -> None:
    names["model"] = tiny_llama()


def _starts_as_the_base(names: dict) -> None:
    ids = token_ids()
    assert torch.equal(names["model"](ids).logits, tiny_llama()(ids).logits)


def _ran_a_batch(names: dict) -> None:
    ids = token_ids()
    names |= {"ids": ids, "attention_mask": ids > 0, "out": names["model"](ids, labels=ids)}


def _carries_gradients(names: dict) -> None:
    assert names["loss"] > names["out"].loss
    names["loss"].backward()
    assert any(p.grad is not None and p.grad.any() for name, p in names["model"].named_parameters() if "router" in name)


def _trains_the_adapters(names: dict) -> None:
    assert names["y"].shape == (2, 10, 64) and names["y"].isfinite().all()
    assert len(names["trained"]) == 6 and all(".adapter." in name for name in names["trained"])


def _computed_y(names: dict) -> None:
    assert names["y"].shape == (10, 32) and names["router_logits"].shape == (10, 4) and names["y"].isfinite().all()


def _is_served(names: dict) -> None:
    ids = token_ids()
    assert names["lost"].keys() >= {"model.layers.0.self_attn.q_proj"}
    served = PeftModel.from_pretrained(tiny_llama(), "served")
    torch.testing.assert_close(served(ids).logits, names["model"].eval()(ids).logits)  # B is still zero


def _has_two_loras(names: dict) -> None:
    for seed, name in enumerate("ab"):
        lora = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
        torch.manual_seed(seed)
        perturb(lora)
        lora.save_pretrained(f"runs/{name}/adapter")
    names |= {"model": tiny_llama(), "input_ids": token_ids()}


@torch.no_grad()
def _merged_both(names: dict) -> None:
    ids, weights = token_ids(), []
    base = names["model"](ids).logits
    assert torch.equal(base, tiny_llama()(ids).logits)
    for name in "ab":
        lora = PeftModel.from_pretrained(tiny_llama(), f"runs/{name}/adapter").merge_and_unload()
        weights.append(lora.state_dict())
    expected = tiny_llama()
    for name, weight in expected.state_dict().items():
        weight += sum(0.5 * (own[name] - weight.clone()) for own in weights)
    saved = PeftModel.from_pretrained(tiny_llama(), "both")
    torch.testing.assert_close(saved(ids).logits, expected(ids).logits)
    assert not torch.allclose(base, expected(ids).logits)


def _is_a_process(names: dict) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{Path('store').resolve()}", rank=0, world_size=1)
    names["model"] = get_peft_model(tiny_llama(), MoSLDConfig(r=2, target_modules=["q_proj"]))
    perturb(names["model"])
    names["model"].save_pretrained("whole")


def _saved_the_shards(names: dict) -> None:
    sharded, whole = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("adapter", "whole"))
    assert sharded.keys() == whole.keys() and all(torch.equal(sharded[name], whole[name]) for name in whole)
    assert any(tensor.any() for tensor in whole.values())


READERS = {
    "README.md": [
        Reader("get_peft_model(model, config)", _has_a_model, _starts_as_the_base),
        Reader("balance_loss(model, attention_mask)", _ran_a_batch, _carries_gradients),
        Reader("MoSLDLinear.from_linear", after=_trains_the_adapters),
        Reader("mosld_kernels.mosld_linear", after=_computed_y),
        Reader("simple_evaluate", needs="lm_eval"),
        Reader("SFTTrainer", needs="trl"),
        Reader("export_lora(model,", after=_is_served),
    ],
    "docs/tutorials/merging.md": [Reader("read_task_vectors", _has_two_loras, _merged_both)],
    "docs/tutorials/several_processes.md": [Reader("fully_shard(model,", _is_a_process, _saved_the_shards)],
}


def reader_of(block: Block) -> Reader:
    """Who reads this block; somebody without anything where the page has nobody else."""
    found = [reader for reader in READERS.get(block.page, []) if reader.text in block.text]
    assert len(found) <= 1, f"{block} is that of {found}"
    return found[0] if found else Reader("")


WITH_CODE = [page for page in PAGES if blocks(page, "python") and page not in ELSEWHERE]


@pytest.mark.parametrize("page", WITH_CODE)
def test_its_code_runs_from_top_to_bottom(page, tmp_path, monkeypatch, offline):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    try:
        for block in blocks(page, "python"):
            reader = reader_of(block)
            if not reader.needs:
                reader.before(names)
                block.run(names)
                reader.after(names)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_every_reader_has_a_block_and_every_other_page_its_test():
    needed = []
    for page, readers in READERS.items():
        found = [reader_of(block) for block in blocks(page, "python")]
        assert [reader for reader in found if reader.text] == readers
        needed += [reader.needs for reader in found if reader.needs]
    assert needed == list(needs) and all(map(optional, needs))
    for page, test in ELSEWHERE.items():
        assert blocks(page, "python") and f'blocks("{page}", "python")' in (ROOT / test).read_text(), page


def optional(library: str) -> Block:
    found = []
    for page in READERS:
        found += [block for block in blocks(page, "python") if reader_of(block).needs == library]
    (block,) = found
    return block


@needs["lm_eval"]
def test_its_code_for_lm_evaluation_harness_counts_what_mosld_eval_counts(tmp_path, monkeypatch, offline):
    import datasets
    from lm_eval import evaluator

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # The harness's own tasks take seven seconds to list.
    monkeypatch.setattr(evaluator, "TaskManager", functools.partial(evaluator.TaskManager, include_defaults=False))
    quiz = [{"prompt": f"{i}?", "choices": ["a", "b", "c"], "answer": i % 3} for i in range(24)]
    Path("quiz_test.jsonl").write_text("".join(json.dumps(item) + "\n" for item in quiz))
    tokenizer = byte_tokenizer()
    model = get_peft_model(tiny_llama(vocab_size=len(tokenizer)), MoSLDConfig(target_modules=["q_proj", "v_proj"]))
    perturb(model)
    *statements, counted = optional("lm_eval").text.rstrip().split("\n")
    names = {"model": model, "tokenizer": tokenizer}
    exec("\n".join(statements), names)
    task = Task("quiz", [], [Example.multiple_choice(**item) for item in quiz])
    expected = score_tasks(model, Encoder(tokenizer, 64), [task])["quiz"].accuracy
    assert eval(counted, names) == expected and 0 < expected < 1


@needs["trl"]
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL sets it
def test_its_code_for_trl_trains(tmp_path, monkeypatch, offline):
    from datasets import Dataset

    monkeypatch.chdir(tmp_path)
    tokenizer = byte_tokenizer()
    names: dict = {
        "model": tiny_llama(vocab_size=len(tokenizer)), "tokenizer": tokenizer,
        "dataset": Dataset.from_dict({"text": ["to be or not to be"] * 8}),
    }  # fmt: skip
    exec(optional("trl").text.replace("max_steps=10", "max_steps=10, use_cpu=True"), names)
    log = names["trainer"].state.log_history[0]
    assert names["trainer"].state.global_step == 10 and log["balance_loss"] > 0
    assert any(parameter.any() for name, parameter in names["trainer"].model.named_parameters() if "expert_b" in name)


def _asked(words: list[str]) -> list[str]:
    """A program or its verb alone, as a text names it, is asked for its help."""
    return [*words, "--help"] if words[1:3] == ["-m", "benchmarks"] and len(words) < 5 else words


def _commands() -> list:
    """A parameter for every command of a block or a text: where it is, and its words."""
    found = []
    for page in PAGES:
        for block in blocks(page, "sh"):
            found += [(str(block), words) for words in block.commands()]
        found += [(page, _asked(words)) for words in mentioned(page)]
    return [pytest.param(*own, id=f"{own[0]} {' '.join(own[1])[:40]}") for own in found]


@pytest.mark.parametrize(("place", "words"), _commands())
def test_a_command_is_understood(place, words, capsys):
    assert fault(words) == "", capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("mosld eval --model X --adapter Y --task a=a.jsonl", ""),
        ("mosld eval --model X --adapter Y --task a=a.jsonl --seeds 3", "mosld eval has no --seeds 3"),
        ("mosld evaluate --model X", "the parser refuses"),
        ("mosld train --learning_rate 1e-3", ""),
        ("mosld train --learning_rates 1e-3", "--learning_rates"),
        ("torchrun --nproc_per_node=8 -m mosld train --quicker", "--quicker"),
        ("torchrun --processes=8 -m mosld train", "the parser refuses"),
        ("make demos", "the Makefile has no demos"),
        (".venv/bin/python -m benchmarks gpu", "the parser refuses"),  # it needs --out
        ("python -m benchmarks gpus --help", "the parser refuses"),
        ("python -m docs.build.method", "there is no module docs.build.method to run"),
        ("python -m tests.integration.processes", "there is no module tests.integration.processes to run"),
        (
            "python -m tests.hardening.mutants tests/hardening/mutants/none.py",
            "tests/hardening/mutants/none.py does not exist",
        ),
        ("NAME=1 curl https://example.org", "curl is no command that is known here"),
    ],
)
def test_a_wrong_command_is_reported(line, wrong):
    message = fault(line.split())
    assert wrong in message and bool(wrong) == bool(message)


def test_the_lines_of_task_files_are_read(tmp_path):
    read = 0
    for page in PAGES:
        for block in blocks(page, "json"):
            faults: list[str] = []
            (tmp_path / "task.jsonl").write_text(block.text)
            assert len(read_examples(tmp_path / "task.jsonl", faults)) == block.text.count("\n") and not faults, block
            read += 1
    assert read


def test_no_block_is_of_a_language_that_is_not_looked_at():
    found = []
    for page in PAGES:
        own = blocks(page)
        found += [block.language for block in own]
        assert {block.language for block in own} <= LANGUAGES, page
        assert len(FENCE.findall(text_of(page))) == 2 * len(own), (
            f"{page} has a fence that does not begin or end a block"
        )
        for block in own:  # what is printed has no commands and no code in it
            if block.language in ("", "text"):
                assert not re.search(r"^(?:\$ |>>> |(?:\S*/)?mosld |make |import )", block.text, flags=re.MULTILINE), (
                    block
                )
    assert found.count("python") >= 11 and found.count("sh") >= 14 and found.count("json") >= 1
