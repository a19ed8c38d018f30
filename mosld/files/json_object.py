"""One JSON object from a file of unknown origin."""

import json
from pathlib import Path
from typing import Any

MAX_BYTES = 16 * 2**20  # a configuration has kilobytes: more is read by nobody
MAX_FIELDS = 1000


def read_json_object(path: Path, error_class: type[ValueError], hint: str = "") -> dict[str, Any]:
    """The fields of the JSON object in the file `path`.

    hint: ends the message about a file of JSON that holds no object.
    raises `error_class`, naming the file, where it cannot be read, is not JSON or holds no object, and for one of more
    than 16 MiB or a thousand fields, which is not read.
    """
    try:
        size = path.stat().st_size
        fields = None if size > MAX_BYTES else json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise error_class(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise error_class(f"{path} is not JSON: {error}") from error
    if size > MAX_BYTES:
        raise error_class(f"{path} has {size:,} bytes: such a file has at most {MAX_BYTES:,}")
    if not isinstance(fields, dict):
        raise error_class(f"{path} must hold an object, got {type(fields).__name__}{hint}")
    if len(fields) > MAX_FIELDS:
        raise error_class(f"{path} has {len(fields):,} fields: such a file has at most {MAX_FIELDS:,}")
    return fields
