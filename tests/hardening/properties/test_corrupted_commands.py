"""`mosld eval` and `mosld export` of a damaged adapter: they say which file it is, end with 2, and write nothing."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st

from mosld import MoSLDConfig
from mosld.files.adapter_folder import CONFIG, DIGEST, WEIGHTS
from tests.hardening.properties.damage import (
    FILES,
    Damage,
    command,
    cuts,
    flips,
    headers,
    records,
    swaps,
    tensor_changes,
    tensors_of,
    write,
)
from tests.hardening.properties.profile import cases
from tests.helpers.cli_data import write_data
from tests.helpers.models import perturb, tiny_llama

TARGETS = ["q_proj"]


def adapter(config: peft.PeftConfig, seed: int) -> dict[str, bytes]:
    model = peft.get_peft_model(tiny_llama(vocab_size=258), config)  # byte_tokenizer's 256 bytes and two more
    torch.manual_seed(seed)
    perturb(model)
    with tempfile.TemporaryDirectory() as name:
        model.save_pretrained(name)
        return {file: (Path(name) / file).read_bytes() for file in FILES if (Path(name) / file).is_file()}


def tensors(files: dict[str, bytes]) -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory() as name:
        return tensors_of(files[WEIGHTS], Path(name, "aside"))


with torch.random.fork_rng():
    SAVED, OTHER = (adapter(MoSLDConfig(r=2, num_experts=3, target_modules=TARGETS), seed) for seed in (1, 2))
    LORA = adapter(peft.LoraConfig(r=2, target_modules=TARGETS), 1)


def not_json(files: dict[str, bytes]) -> None:
    files[CONFIG] = files[CONFIG].replace(b"{", b"[", 1)


def of_no_method(files: dict[str, bytes]) -> None:
    files[CONFIG] = files[CONFIG].replace(b'"MOSLD"', b'"MOSLP"').replace(b'"LORA"', b'"LORB"')


DAMAGES = st.one_of(
    *(kind(file, len(SAVED[file])) for kind in (flips, cuts) for file in (DIGEST, WEIGHTS)),
    cuts(CONFIG, len(SAVED[CONFIG]) - 2),  # more than its last brace and line
    headers(SAVED[WEIGHTS]),
    records(SAVED[DIGEST]),
    swaps(tensors(SAVED), tensors(OTHER)),
    tensor_changes(tensors(SAVED)),
    st.builds(Damage, st.just("not JSON"), st.just(not_json)),
    st.builds(Damage, st.just("of no method"), st.just(of_no_method)),
)


@pytest.fixture(scope="module")
def data() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield write_data(Path(name))


def run(data: Path, files: dict[str, bytes], verb: str) -> None:
    (data / "adapter").mkdir(exist_ok=True)
    write(files, data / "adapter")
    task = ["--task", f"even={data / 'even.jsonl'}"] if verb == "eval" else []
    own = ["--model", str(data / "model"), "--adapter", str(data / "adapter"), "--output", str(data / "out")]
    command(verb, *own, *task)


def refused(data: Path, files: dict[str, bytes], verb: str) -> None:
    try:
        with pytest.raises(ValueError) as caught:
            run(data, files, verb)
        assert any(str(data / "adapter" / name) in str(caught.value) for name in FILES), caught.value
        assert not (data / "out").exists()
    finally:
        remove(data / "out")  # of a run that should have been refused: the next one shall fail for its own reasons


def remove(out: Path) -> None:
    shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)


BLANKS = b" \t\r\n"  # which after JSON are JSON


def same(files: dict[str, bytes], saved: dict[str, bytes]) -> bool:
    """Damage without effect: blanks after the configuration, a capital letter in the checksum, a lost comment."""
    records = (own.get(DIGEST, b"").lower().split(b"\n")[0].split() for own in (files, saved))
    return (
        files[WEIGHTS] == saved[WEIGHTS]
        and files[CONFIG].rstrip(BLANKS) == saved[CONFIG].rstrip(BLANKS)
        and len({tuple(record[:1] + [name.removeprefix(b"*") for name in record[1:]]) for record in records}) == 1
    )


@cases(25, damage=DAMAGES, verb=st.sampled_from(("eval", "export")))
def test_a_command_names_the_file_and_ends_with_2(data, damage, verb):
    files = damage(SAVED)
    assume(not same(files, SAVED))
    refused(data, files, verb)


@cases(15, damage=cuts(WEIGHTS, len(LORA[WEIGHTS])) | cuts(CONFIG, len(LORA[CONFIG]) - 2))
def test_eval_of_a_lora_that_is_cut_off(data, damage):
    files = damage(LORA)
    assume(not same(files, LORA))
    refused(data, files, "eval")


def test_undamaged_they_run(data):
    for files, verb in ((SAVED, "eval"), (SAVED, "export"), (LORA, "eval")):
        run(data, files, verb)
        assert (data / "out").exists()
        remove(data / "out")
