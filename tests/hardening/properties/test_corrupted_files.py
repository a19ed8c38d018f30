"""A saved adapter that was damaged, in whatever way, is refused with the file's name, and the model stays as it was.

What cannot be seen: weights that were altered where no checksum lies beside them. PEFT needs none, adapters saved by
other programs or before there were checksums have none, and who deletes it asks for that. There a changed number is a
number. Of such files what is tested is all but the numbers, and that merging refuses what is not finite.

PEFT reads adapter_config.json before any code of ours. Where the file no longer says that it is of MoSLD, PEFT's
loaders fail with PEFT's own error, which does not name the file; the commands name it.
"""

import contextlib
import json
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import save
from torch import Tensor, nn

from mosld import MoSLDConfig
from mosld.analysis.saved_adapters import inspect_adapter
from mosld.files.adapter_folder import CONFIG, DESCRIPTIVE_FIELDS, DIGEST, WEIGHTS
from mosld.merging.read import read_task_vectors
from mosld.merging.vectors import MergeError
from mosld.tuner.layer import MoSLDLayer
from tests.hardening.properties.damage import (
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
from tests.helpers.models import perturb, tiny_llama, token_ids

SMALL = dict(hidden_size=8, intermediate_size=12, num_attention_heads=2, num_key_value_heads=1)
IDS = token_ids(2, 5)
TARGETS = ["q_proj", "down_proj"]


def adapter(seed: int, **base) -> PeftModel:
    model = get_peft_model(tiny_llama(**{**SMALL, **base}), MoSLDConfig(r=2, num_experts=3, target_modules=TARGETS))
    torch.manual_seed(seed)
    perturb(model)
    return model.eval()


def read(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (CONFIG, DIGEST, WEIGHTS)}


with tempfile.TemporaryDirectory() as _name, torch.random.fork_rng():
    adapter(1).save_pretrained(_name)
    SAVED = read(Path(_name))
    TENSORS = tensors_of(SAVED[WEIGHTS], Path(_name, "aside"))
    adapter(2).save_pretrained(_name)
    OTHER = tensors_of((Path(_name) / WEIGHTS).read_bytes(), Path(_name, "aside"))
    with torch.no_grad():
        EXPECTED = adapter(1)(IDS).logits


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class Place:
    """Where damaged files lie, and the models they are loaded into, made once: none of them may change."""

    def __init__(self, folder: Path):
        self.folder, self.base, self.loaded = folder, tiny_llama(**SMALL), adapter(3)
        self.of_base, self.of_loaded = state_of(self.base), state_of(self.loaded)

    def __repr__(self) -> str:
        return "Place"

    def same(self) -> None:
        for model, before in ((self.base, self.of_base), (self.loaded, self.of_loaded)):
            now = model.state_dict()
            assert list(now) == list(before)
            assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
        assert not any(isinstance(module, MoSLDLayer) for module in self.base.modules())
        assert list(self.loaded.peft_config) == ["default"] and self.loaded.active_adapters == ["default"]
        names = {name for module in self.loaded.modules() if isinstance(module, MoSLDLayer) for name in module.mixtures}
        assert names == {"default"}


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with tempfile.TemporaryDirectory() as name:
        yield Place(Path(name))


def into_a_base(place: Place) -> Tensor:
    model = PeftModel.from_pretrained(place.base, str(place.folder))
    with torch.no_grad():
        logits = model.eval()(IDS).logits
    model.unload()
    return logits


def beside_another(place: Place) -> Tensor:
    place.loaded.load_adapter(str(place.folder), "second")
    place.loaded.set_adapter("second")
    with torch.no_grad():
        logits = place.loaded.eval()(IDS).logits
    place.loaded.set_adapter("default")
    place.loaded.delete_adapter("second")
    return logits


# What reads a saved adapter -> what the adapter makes of IDS, or None where nothing is computed.
READERS: dict[str, Callable[[Place], Tensor | None]] = {
    "PeftModel.from_pretrained": into_a_base,
    "model.load_adapter": beside_another,
    "inspect_adapter": lambda place: inspect_adapter(place.folder) and None,
    "read_task_vectors": lambda place: read_task_vectors([place.folder]) and None,
    "mosld inspect": lambda place: command("inspect", str(place.folder)),
}


WITH_MODEL = ("PeftModel.from_pretrained", "model.load_adapter")


def is_ours(files: dict[str, bytes]) -> bool:
    """Whether PEFT can see that the adapter is of MoSLD."""
    try:
        fields = json.loads(files[CONFIG])
    except (ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and fields.get("peft_type") == "MOSLD"


def refused(place: Place, damage: Damage, reader: str) -> None:
    files = damage(SAVED)
    write(files, place.folder)
    if damage.needs_model and reader not in WITH_MODEL:
        READERS[reader](place)
        return
    by_peft = reader in WITH_MODEL and not is_ours(files)
    with warnings_aside(), pytest.raises(Exception if by_peft else ValueError) as caught:
        READERS[reader](place)
    assert by_peft or any(str(place.folder / name) in str(caught.value) for name in (CONFIG, DIGEST, WEIGHTS)), caught
    place.same()


def unharmed(place: Place, damage: Damage, reader: str) -> None:
    """Damage that changed nothing that counts: the adapter is what it was."""
    write(damage(SAVED), place.folder)
    with warnings_aside():
        logits = READERS[reader](place)
    assert logits is None or torch.equal(logits, EXPECTED)
    place.same()


@contextlib.contextmanager
def warnings_aside() -> Iterator[None]:
    """Of fields that are not known, before the rest is looked at."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="adapter_config.json has fields that this version of mosld does not know"
        )
        yield


def readers() -> st.SearchStrategy[str]:
    return st.sampled_from(sorted(READERS))


def test_undamaged_it_is_what_it_was(place):
    for reader in READERS:
        unharmed(place, Damage("none", lambda files: None), reader)


@cases(80, damage=flips(WEIGHTS, len(SAVED[WEIGHTS])) | cuts(WEIGHTS, len(SAVED[WEIGHTS])), reader=readers())
def test_weights_that_are_not_those_that_were_saved(place, damage, reader):
    refused(place, damage, reader)


def counts(files: dict[str, bytes]) -> str:
    """All of the configuration that decides what is computed, and what JSON made of it."""
    fields = json.loads(files[CONFIG])
    return repr(sorted((name, value) for name, value in fields.items() if name not in DESCRIPTIVE_FIELDS))


@cases(150, damage=flips(CONFIG, len(SAVED[CONFIG])) | cuts(CONFIG, len(SAVED[CONFIG])), reader=readers())
def test_a_configuration_that_is_not_the_one_that_was_saved(place, damage, reader):
    """Where the base model lies, and what else changes nothing of what is computed, may be another."""
    files = damage(SAVED)
    if is_ours(files) and counts(files) == counts(SAVED) and told_can_be_read(files):
        unharmed(place, damage, reader)
    else:
        refused(place, damage, reader)


def told_can_be_read(files: dict[str, bytes]) -> bool:
    try:
        MoSLDConfig(**json.loads(files[CONFIG]))
    except (ValueError, TypeError):
        return False
    return True


@cases(
    100,
    damage=flips(DIGEST, len(SAVED[DIGEST])) | cuts(DIGEST, len(SAVED[DIGEST])) | records(SAVED[DIGEST]),
    reader=readers(),
)
def test_a_checksum_that_is_another_refuses_or_says_the_same(place, damage, reader):
    """A capital letter is the same number, and what is no comment any more has no meaning: the weights are the same."""
    write(damage(SAVED), place.folder)
    try:
        logits = READERS[reader](place)
    except ValueError as error:
        assert str(place.folder / DIGEST) in str(error) or f"{DIGEST} beside it" in str(error)
    else:
        first = SAVED[DIGEST].split()[0].lower()
        assert first in (place.folder / DIGEST).read_bytes().lower()
        assert logits is None or torch.equal(logits, EXPECTED)
    place.same()


@cases(120, damage=headers(SAVED[WEIGHTS]), reader=readers())
def test_a_header_that_no_file_has(place, damage, reader):
    refused(place, damage, reader)


@cases(120, damage=tensor_changes(TENSORS), reader=readers())
def test_tensors_that_are_not_those_of_the_adapter(place, damage, reader):
    refused(place, damage, reader)


@cases(40, damage=swaps(TENSORS, OTHER), reader=readers())
def test_tensors_of_another_adapter(place, damage, reader):
    refused(place, damage, reader)


@cases(
    30,
    name=st.sampled_from(sorted(TENSORS)),
    place_in=st.integers(0, 10**6),
    value=st.sampled_from((math.inf, -math.inf, math.nan)),
)
def test_merging_refuses_numbers_that_are_not_finite(place, name, place_in, value):
    """Without a checksum, which alone shows altered numbers otherwise."""
    changed = {own: tensor.clone() for own, tensor in TENSORS.items()}
    changed[name].view(-1)[place_in % changed[name].numel()] = value
    made = save(changed, metadata={"format": "pt"})
    write({CONFIG: SAVED[CONFIG], WEIGHTS: made}, place.folder)
    if name.endswith("mosld_router.weight"):  # which fixed gates leave out
        read_task_vectors([place.folder])
        return
    with pytest.raises(MergeError, match="values that are not finite in ") as caught:
        read_task_vectors([place.folder])
    assert str(place.folder) in str(caught.value) and name.split(".mosld")[0].removeprefix("base_model.model.") in str(
        caught.value
    )
