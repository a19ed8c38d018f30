import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest

from mosld import MoSLDConfig
from mosld.cli.main import main
from tests.helpers.cli_data import write_data
from tests.helpers.models import perturb, tiny_llama

Said = tuple[int, str]


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A model's folder, two task files, and adapters on it: `mosld` and `lora`. No test writes there."""
    folder = write_data(tmp_path_factory.mktemp("security"))
    for name, config in {
        "mosld": MoSLDConfig(r=2, num_experts=2, target_modules=["q_proj"]),
        "lora": peft.LoraConfig(r=2, target_modules=["q_proj"]),
    }.items():
        model = peft.get_peft_model(tiny_llama(vocab_size=258), config)  # byte_tokenizer's 256 bytes and two more
        perturb(model)
        model.save_pretrained(str(folder / name))
    return folder


@pytest.fixture
def say() -> Callable[..., Said]:
    """`mosld` with these words -> its exit status and what it prints to stderr."""

    def run(*words: object) -> Said:
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            status = main([str(word) for word in words])
        return status, said.getvalue()

    return run


@pytest.fixture
def adapter(data, tmp_path) -> Callable[..., Path]:
    """A copy of an adapter, called by its method, with other fields in its configuration and without its checksum."""

    def copy(method: str, weights: bool = True, **fields: object) -> Path:
        folder = tmp_path / method
        folder.mkdir()
        own = json.loads((data / method / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**own, **fields}))
        if weights:
            name = "adapter_model.safetensors"
            (folder / name).write_bytes((data / method / name).read_bytes())
        return folder

    return copy


def seen(folder: Path, *, without: Path | None = None) -> dict[str, bytes | None]:
    """Every file and folder below `folder`, with its bytes, but for those below `without`."""
    return {
        str(path): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if without is None or not path.is_relative_to(without)
    }
