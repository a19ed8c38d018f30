"""Folders of whole models of unknown origin, checked before transformers or safetensors opens what their files name.

A folder's index says which file has which tensor, and transformers joins what it says to the folder's path: it may name
a file elsewhere, or a pickle. Here a tensor's file is a safetensors file in the folder itself, or nothing is read.
"""

from pathlib import Path
from typing import Any

from .adapter_folder import CONFIG as ADAPTER_CONFIG
from .json_object import read_json_object

MODEL_CONFIG, INDEX = "config.json", "model.safetensors.index.json"
SUFFIX = ".safetensors"


class ModelFileError(ValueError):
    """A model's folder that is not read; the message names the file and the entry."""


def check_model_folder(folder: Path) -> None:
    """raises ModelFileError for a folder whose index names files that are not its own, and for an adapter's.

    Of an adapter's folder transformers would load the base model that a file in it names. A path that is no folder is a
    name of the hub, and passes.
    """
    if not folder.is_dir():
        return
    if (folder / ADAPTER_CONFIG).is_file():
        raise ModelFileError(
            f"{folder} has an {ADAPTER_CONFIG}: it is an adapter's, and the model is its base, which is to be given by "
            "name"
        )
    config: dict[str, Any] = {}
    if (folder / MODEL_CONFIG).is_file():
        config = read_json_object(folder / MODEL_CONFIG, ModelFileError)
    for name in (INDEX, config.get("transformers_weights")):
        if isinstance(name, str) and name.endswith(f"{SUFFIX}.index.json") and (folder / name).is_file():
            files_of(folder, name)


def files_of(folder: Path, index: str = INDEX) -> dict[str, Path]:
    """A tensor's name -> the file in `folder` that has it, by the index there.

    raises ModelFileError for an index that is none, and for a file that is not in the folder or no safetensors file.
    """
    path = folder / index
    entries = read_json_object(path, ModelFileError).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise ModelFileError(f"{path} has no weight_map, which says which file has which tensor")
    files = {}
    for tensor, file in entries.items():
        own = isinstance(file, str) and file.endswith(SUFFIX) and not set(file) & set("/\\:\0") and file.isprintable()
        if not own:
            raise ModelFileError(
                f"{path} has {tensor!r:.100} in {file!r:.100}, which is no safetensors file of the folder {folder}"
            )
        if not (folder / file).is_file():
            raise ModelFileError(f"{path} has {tensor!r:.100} in {file}, which is missing")
        files[tensor] = folder / file
    return files
