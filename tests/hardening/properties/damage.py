"""Random damage to a saved adapter. A damage is plain values, so a failing one can be read, shrunk and made again."""

import contextlib
import io
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from mosld.cli.main import main
from mosld.files.adapter_folder import CONFIG, DIGEST, WEIGHTS
from mosld.tuner.weights import MAX_KEY

FILES = (CONFIG, DIGEST, WEIGHTS)


@dataclass(frozen=True)
class Damage:
    """What is done to a copy of a saved adapter, its three files as bytes, before it is written.

    needs_model: whether the files are whole and only a model shows that they are not of its layers.
    """

    what: str
    do: Callable[[dict[str, bytes]], None] = field(repr=False, compare=False)
    needs_model: bool = False

    def __call__(self, files: dict[str, bytes]) -> dict[str, bytes]:
        files = dict(files)
        self.do(files)
        return files


def write(files: dict[str, bytes], folder: Path) -> None:
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
        if name in files:
            (folder / name).write_bytes(files[name])


def command(*words: str) -> None:
    """`mosld` with these words; raises ValueError, with all that it says, where it ends with 2."""
    said, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        code = main(list(words))
    if code:
        assert code == 2 and said.getvalue() == ""
        raise ValueError(errors.getvalue())


def tensors_of(data: bytes, aside: Path) -> dict[str, Tensor]:
    aside.write_bytes(data)
    with safe_open(aside, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping


@st.composite
def flips(draw, file: str, size: int) -> Damage:
    """One to three bytes changed, anywhere in the file."""
    changes = draw(
        st.dictionaries(st.integers(0, size - 1), st.integers(1, 255), min_size=1, max_size=3).map(
            lambda found: dict(sorted(found.items()))
        )
    )

    def do(files: dict[str, bytes]) -> None:
        data = bytearray(files[file])
        for place, by in changes.items():
            data[place] ^= by
        files[file] = bytes(data)

    return Damage(f"{file}: {changes} flipped", do)


@st.composite
def cuts(draw, file: str, size: int) -> Damage:
    """Cut off after any byte, or longer than it was."""
    kept = draw(st.integers(0, size - 1))
    more = draw(st.binary(max_size=9))
    if draw(st.booleans()):
        return Damage(f"{file}: cut off at {kept}", lambda files: files.update({file: files[file][:kept]}))
    return Damage(f"{file}: {more!r} after it", lambda files: files.update({file: files[file] + (more or b"\0")}))


def header(data: bytes) -> tuple[dict, bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(text: bytes, rest: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + rest


def _move(fields: dict, place: int, by: tuple[int, int]) -> None:
    offsets = fields[sorted(name for name in fields if name != "__metadata__")[place]]["data_offsets"]
    offsets[0], offsets[1] = offsets[0] + by[0], offsets[1] + by[1]


@st.composite
def headers(draw, data: bytes) -> Damage:
    """A header that no safetensors file has. The checksum goes along: whoever makes such a file can write that too."""
    fields, rest = header(data)
    names = sorted(name for name in fields if name != "__metadata__")
    name = draw(st.sampled_from(names))
    kind = draw(
        st.sampled_from(
            (
                "length",
                "text",
                "moved",
                "overlapping",
                "negative",
                "twice",
                "shape",
                "dtype",
                "deep",
                "digits",
                "renamed",
            )
        )
    )
    text, length = json.dumps(fields).encode(), None
    if kind == "length":
        length = draw(st.sampled_from((2**64 - 1, 2**63, 2**40, 10**8, len(data), len(data) - 8, 0)))
    elif kind == "text":
        text = draw(st.sampled_from((b"[]", b"null", b"7", b'"x"', b"{", b"\xff\xfe{}", b"{}}", b"  ")))
    elif kind == "deep":
        text = b"[" * draw(st.sampled_from((10, 5000, 200_000)))
    elif kind in ("moved", "negative"):
        by = draw(st.integers(1, 2**70)) * (-1 if kind == "negative" else 1)
        _move(fields, names.index(name), draw(st.sampled_from(((by, by), (by, 0), (0, by)))))
        text = json.dumps(fields).encode()
    elif kind == "overlapping":
        other = draw(st.sampled_from([one for one in names if one != name]))
        fields[name]["data_offsets"] = fields[other]["data_offsets"]
        text = json.dumps(fields).encode()
    elif kind == "twice":
        other = draw(st.sampled_from([one for one in names if one != name]))
        again = json.dumps({name: fields[other]})[1:-1]
        text = f"{json.dumps(fields)[:-1]}, {again}}}".encode()
    elif kind == "shape":
        fields[name]["shape"] = draw(
            st.sampled_from(([], [2**63], [2**32, 2**32], [-1, 8], [0, 2**62], "8", [1.5], [2, 2, 2, 2])) | st.lists(
                st.integers(-3, 2**64), max_size=4)
        )  # fmt: skip
        text = json.dumps(fields).encode()
    elif kind == "dtype":
        fields[name]["dtype"] = draw(st.sampled_from(("I32", "F64", "BF16", "U8", "f32", "", None, "COMPLEX", 3)))
        text = json.dumps(fields).encode()
    elif kind == "digits":
        digits = draw(st.sampled_from(("²", "9" * 200, "9" * 5000, "٣")))
        fields = {own.replace("layers.0", f"layers.{digits}"): value for own, value in fields.items()}
        text = json.dumps(fields, ensure_ascii=False).encode()
    else:
        fields[draw(st.text(max_size=9))] = fields.pop(name)
        text = json.dumps(fields).encode()
    made = with_header(text, rest, length)
    return Damage(
        f"{WEIGHTS}: {kind} in the header of {name}: {text[:60]!r}",
        lambda files: _unrecorded(files, made),
        kind == "digits" and max(map(len, fields)) <= MAX_KEY,
    )


def _unrecorded(files: dict[str, bytes], weights: bytes) -> None:
    files[WEIGHTS] = weights
    files.pop(DIGEST)


INTEGERS = (torch.int64, torch.int8, torch.bool, torch.uint8)


@st.composite
def tensor_changes(draw, tensors: dict[str, Tensor]) -> Damage:
    """Weights that are a whole safetensors file, and not those of this adapter. Without a checksum."""
    name, kind = (
        draw(st.sampled_from(sorted(tensors))),
        draw(st.sampled_from(("missing", "layer", "more", "dtype", "shape"))),
    )
    changed, needs_model = {own: tensor.clone() for own, tensor in tensors.items()}, kind == "layer"
    layer, _, part = name.rpartition(".mosld_")
    if kind == "missing":
        del changed[name]
    elif kind == "layer":
        changed = {own: tensor for own, tensor in changed.items() if not own.startswith(f"{layer}.mosld_")}
    elif kind == "more":
        part = draw(
            st.sampled_from(("mosld_mixer.weight", "mosld_gate_a.weight", "mosld_new.weight", "mosld_router.bias"))
        )
        changed[f"{layer}.{part}"] = torch.ones(3, 8)
    elif kind == "dtype":
        changed[name] = changed[name].to(draw(st.sampled_from(INTEGERS)))
    else:
        rows, columns = changed[name].shape
        sizes = draw(
            st.tuples(st.integers(0, 12), st.integers(0, 12)).filter(lambda sizes: sizes != (rows, columns))
            | st.sampled_from(((rows * columns,), (1, rows, columns), ()))
        )
        changed[name] = torch.ones(sizes)
        needs_model = (
            part == "expert_b.weight" and len(sizes) == 2 and sizes[0] > 0 and sizes[1] == columns
        )  # of another out_features
    made = save(changed, metadata={"format": "pt"})
    return Damage(f"{kind} of {name}", lambda files: _unrecorded(files, made), needs_model)


@st.composite
def swaps(draw, tensors: dict[str, Tensor], other: dict[str, Tensor]) -> Damage:
    """Tensors of another adapter of the same sizes among those of this one, or of another layer of it."""
    names = draw(st.sets(st.sampled_from(sorted(tensors)), min_size=1))
    changed = {**tensors, **{name: other[name] for name in names}}
    made = save(changed, metadata={"format": "pt"})
    return Damage(f"{sorted(names)} of another adapter", lambda files: files.update({WEIGHTS: made}))


@st.composite
def records(draw, recorded: bytes) -> Damage:
    """A checksum that is another, of another file, or none."""
    text = recorded.decode()
    digest = text.split()[0]
    made = draw(
        st.sampled_from(("0" * 64, digest[:-1], digest[::-1], "", "none", "0" * 10**6)).map(
            lambda wrong: text.replace(digest, wrong)
        )
        | st.sampled_from(("", "\n\n", "#", text.replace(WEIGHTS, "model.safetensors"), f"{digest}\n", "\0" * 99))
        | st.text(max_size=40)
    )
    return Damage(f"{DIGEST}: {made[:70]!r}", lambda files: files.update({DIGEST: made.encode()}))
