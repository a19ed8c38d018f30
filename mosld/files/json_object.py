"""One JSON object from a file of unknown origin."""

import json
from pathlib import Path
from typing import Any


def read_json_object(path: Path, error_class: type[ValueError], hint: str = "") -> dict[str, Any]:
    """The fields of the JSON object in the file `path`.

    hint: ends the message about a file of JSON that holds no object.
    raises `error_class`, naming the file, where it cannot be read, is not JSON or holds no object.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise error_class(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise error_class(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise error_class(f"{path} must hold an object, got {type(fields).__name__}{hint}")
    return fields
