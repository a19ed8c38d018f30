"""Folders of whole models from anywhere, looked at before transformers or safetensors opens what their files name.

A folder's index says which file has which tensor, and transformers joins what it says to the folder's path: it may name a file
elsewhere, or a pickle. Here a tensor's file is a safetensors file in the folder itself, or nothing is read.
"""

import json
from pathlib import Path
from typing import Any

from .adapter_folder import CONFIG as ADAPTER_CONFIG

MODEL_CONFIG, INDEX = "config.json", "model.safetensors.index.json"
SUFFIX = ".safetensors"


class ModelFileError(ValueError):
    """A model's folder that is not read; the message names the file and the entry."""


def check_model_folder(folder: Path) -> None:
    """raises ModelFileError for a folder whose index names files that are not its own, and for one of an adapter, whose base
    model transformers would look up by the name that a file in it gives. What is no folder is a hub name, and passes."""
    if not folder.is_dir():
        return
    if (folder / ADAPTER_CONFIG).is_file():
        raise ModelFileError(
            f"{folder} has an {ADAPTER_CONFIG}: it is an adapter's, and the model is its base, which is to be given by name"
        )
    named = (
        read_object(folder / MODEL_CONFIG).get("transformers_weights") if (folder / MODEL_CONFIG).is_file() else None
    )
    for name in {INDEX, named}:
        if isinstance(name, str) and name.endswith(f"{SUFFIX}.index.json") and (folder / name).is_file():
            files_of(folder, name)


def files_of(folder: Path, index: str = INDEX) -> dict[str, Path]:
    """A tensor's name -> the file in `folder` that has it, as the index there tells.

    raises ModelFileError for an index that is none, and for a file that is not in the folder or no safetensors file.
    """
    path = folder / index
    entries = read_object(path).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise ModelFileError(f"{path} has no weight_map, which says which file has which tensor")
    for tensor, file in entries.items():
        own = isinstance(file, str) and file.endswith(SUFFIX) and not set(file) & set("/\\:\0") and file.isprintable()
        if not own:
            raise ModelFileError(
                f"{path} has {tensor!r:.100} in {file!r:.100}, which is no safetensors file of the folder {folder}"
            )
        if not (folder / file).is_file():
            raise ModelFileError(f"{path} has {tensor!r:.100} in {file}, which is missing")
    return {tensor: folder / file for tensor, file in entries.items()}


def read_object(path: Path) -> dict[str, Any]:
    """raises ModelFileError, naming the file, where it holds no JSON object."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ModelFileError(f"{path} must hold an object, got {type(fields).__name__}")
    return fields
