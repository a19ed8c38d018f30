"""Random calls of the operator. A recipe is plain values, so a failing one can be read, shrunk and made again."""

import contextlib
import math
from typing import NamedTuple
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor

from mosld_kernels import grouped, mosld_delta, mosld_linear
from mosld_kernels.autograd import Inputs, Settings
from mosld_kernels.precision import router_dtype
from tests.hardening.properties.formula import GRADIENTS
from tests.helpers.inputs import Shape

# Hypothesis draws the first of a list most often and shrinks to it, so the first is a usual one.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("plain", "plain", "transposed", "strided", "offset", "expanded")
KINDS = ("normal", "normal", "normal", "integers", "wide", "sparse", "zeros", "constant", "tiny", "huge")
MODERATE = ("normal", "integers", "sparse", "zeros", "constant")  # nothing overflows in float16
TENSORS = (*GRADIENTS, "dout", "dlogits")
TRAINED = ("x", "shared_a", "expert_b", "router_weight")
SUBSETS = st.tuples(*[st.booleans()] * 6).map(
    lambda bits: tuple(n for n, bit in zip(GRADIENTS, bits, strict=True) if bit)
)
WANTED = st.one_of(st.just(GRADIENTS), st.just(TRAINED), SUBSETS)  # mostly all of them
SIZES = st.sampled_from((3, 1, 2, 4, 5, 7, 8, 9, 16, 17, 31, 33, 65))  # tiles, and one past them
# Lies between the numbers of a strided tensor. It is finite, since torch's own products may multiply it by zero.
GARBAGE = 3e4


class Recipe(NamedTuple):
    """One call. kinds and layouts: of x, weight, bias, shared_a, expert_b, router_weight, dout, dlogits, by name."""

    shape: Shape
    leading: tuple[int, ...]
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    dropout_p: float
    scale: float
    base: bool
    bias: bool
    wanted: tuple[str, ...]  # which tensors require a gradient
    incoming: tuple[str, ...]  # which of dout and dlogits arrive
    kinds: dict[str, str]
    layouts: dict[str, str]
    by_tokens: bool  # whether the products go over tokens sorted by expert
    seed: int

    def sizes(self) -> dict[str, tuple[int, ...]]:
        _, d_in, d_out, rank, experts, _, _ = self.shape
        return {
            "x": (*self.leading, d_in), "weight": (d_out, d_in), "bias": (d_out,), "shared_a": (self.shape.rows, d_in),
            "expert_b": (d_out, experts * rank), "router_weight": (experts, d_in), "dout": (*self.leading, d_out),
            "dlogits": (*self.leading, experts),
        }  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        """All eight, in their dtypes and layouts; none requires a gradient yet."""
        generator = torch.Generator().manual_seed(self.seed)
        made = {}
        for name, size in self.sizes().items():
            adapts = name in ("shared_a", "expert_b", "router_weight")
            dtype = self.adapter_dtype if adapts else router_dtype(self.dtype) if name == "dlogits" else self.dtype
            # Products of this many numbers are about 1.
            fan = {"weight": "D_in", "shared_a": "D_in", "router_weight": "D_in", "expert_b": "R"}.get(name)
            scale = 1.0 if fan is None else getattr(self.shape, fan) ** -0.5
            values = numbers(self.kinds[name], size, scale, dtype, generator)
            made[name] = laid_out(values.to(dtype), self.layouts[name])
        return made

    def present(self) -> list[str]:
        """The names of what the operator is given."""
        left_out = () if self.bias else ("bias",) if self.base else ("weight", "bias")
        return [name for name in GRADIENTS if name not in left_out]

    def update_only(self) -> "Recipe":
        """The same without a base, and nothing arriving for the logits: all that is left is linear in the update."""
        return self._replace(base=False, bias=False, incoming=("dout",))

    def settings(self) -> Settings:
        return Settings(self.shape.K, self.scale, self.dropout_p, "eager", self.shape.mixing)


def numbers(kind: str, size: tuple[int, ...], scale: float, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    normal = torch.randn(size, generator=generator, dtype=torch.float64) * scale
    if kind == "integers":  # with many equal logits
        return torch.randint(-2, 3, size, generator=generator).double()
    if kind == "signs":
        return torch.randint(-1, 2, size, generator=generator).double()
    if kind == "coarse":  # three times as much fits into bfloat16, too
        return torch.randint(-31, 32, size, generator=generator).double() / 16
    if kind == "wide":
        return normal * 2.0 ** torch.randint(-6, 4, size, generator=generator)
    if kind == "sparse":
        return normal * (torch.rand(size, generator=generator) < 0.2)
    if kind == "zeros":
        return normal * 0
    if kind == "constant":
        return torch.full(size, scale, dtype=torch.float64)
    if kind == "tiny":  # subnormal, or nearly so
        return normal * 4 * torch.finfo(dtype).tiny
    if kind == "huge":  # saturates a router
        return normal * (100 if dtype == torch.float16 else 1e4)
    assert kind == "normal"
    return normal


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same numbers ("expanded": the first row for all) with other strides, or elsewhere in a larger storage"""
    if values.dim() == 0 or values.numel() == 0:
        return values
    if layout == "transposed" and values.dim() > 1:
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        wide = values.new_full((*values.shape[:-1], 2 * values.shape[-1]), GARBAGE)
        wide[..., ::2] = values
        return wide[..., ::2]
    if layout == "offset":
        return torch.cat((values.new_full((3,), GARBAGE), values.flatten()))[3:].view(values.shape)
    if layout == "expanded":
        return values[:1].expand(values.shape)
    return values


EXTREMES = ("nan", "inf", "-inf", "max", "-max", "tiny", "subnormal", "-0")
INSERTED = st.tuples(st.sampled_from(TENSORS), st.integers(0, 2**20), st.sampled_from(EXTREMES))


def insert(tensors: dict[str, Tensor], where: list[tuple[str, int, str]]) -> None:
    """Puts extremes into tensors, in place: tensor, which of its numbers, what; into every row of an expanded one."""
    for name, place, what in where:
        tensor = tensors[name]
        if not tensor.numel():
            continue
        info = torch.finfo(tensor.dtype)
        known = {"max": info.max, "-max": info.min, "tiny": info.tiny, "subnormal": info.tiny * info.eps}
        index = torch.unravel_index(torch.tensor(place % tensor.numel()), tensor.shape)
        tensor[index] = known[what] if what in known else float(what)


@st.composite
def shapes(draw, mixing=None, most_tokens: int = 65) -> tuple[Shape, tuple[int, ...]]:
    """-> a shape and the leading dimensions of x, whose product is its T"""
    leading = draw(
        st.one_of(
            st.tuples(SIZES),
            st.sampled_from(((), (1,), (0,), (2, 0), (0, 3), (2, 1, 3))),
            st.tuples(st.integers(1, 3), st.sampled_from((1, 2, 5, 11))),
        ).filter(lambda sizes: math.prod(sizes) <= most_tokens)
    )
    experts = draw(st.sampled_from((4, 1, 2, 3, 5, 8, 9, 17)))
    top_k = draw(st.sampled_from((min(2, experts), 1, max(1, experts // 2), max(1, experts - 1), experts)))
    rank = draw(st.sampled_from((2, 1, 3, 4, 5, 8, 9, 17)))
    mixing = mixing or draw(st.sampled_from(("expand", "diagonal")))
    return Shape(math.prod(leading), draw(SIZES), draw(SIZES), rank, experts, top_k, mixing), leading


@st.composite
def recipes(draw, kinds=KINDS, layouts=LAYOUTS, dtypes=DTYPES, mixing=None) -> Recipe:
    shape, leading = draw(shapes(mixing))
    dtype = draw(st.sampled_from(dtypes))
    base = draw(st.sampled_from((True, True, False)))
    return Recipe(
        shape,
        leading,
        dtype,
        draw(st.sampled_from((dtype, *dtypes))),
        dropout_p=draw(st.sampled_from((0.1, 0.0, 1e-3, 0.1, 0.5, 0.999, 1.0))),
        scale=draw(st.sampled_from((2.0, 1.0, 0.3, -1.7, 0.0, 1))),
        base=base,
        bias=draw(st.sampled_from((True, True, False))) and base,
        wanted=draw(WANTED),
        incoming=draw(st.sampled_from((("dout", "dlogits"), ("dout",), ("dlogits",)))),
        kinds={name: draw(st.sampled_from(kinds)) for name in TENSORS},
        layouts={name: draw(st.sampled_from(layouts)) for name in TENSORS},
        by_tokens=draw(st.sampled_from((False, True))),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def identical(a: Tensor, b: Tensor) -> bool:
    """The same numbers, where they are numbers at all."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(*(torch.where(t.isnan(), 0.0, t) for t in (a, b)))


def flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


class Called(NamedTuple):
    """One call and its results: y, logits and dx flattened to [T, ...], the wanted gradients by their names."""

    inputs: Inputs
    results: dict[str, Tensor]
    dout: Tensor | None
    dlogits: Tensor | None


def call(recipe: Recipe, tensors: dict[str, Tensor] | None = None, **changes) -> Called:
    """Runs the recipe, on its own tensors or on these; `changes` are other values of its settings.

    It also checks what holds for every call: shapes, dtypes, which gradients come, and that no argument is written to.
    """
    tensors = recipe.tensors() if tensors is None else tensors
    settings = recipe.settings()._replace(**changes)
    present = recipe.present()
    wanted = [n for n in recipe.wanted if n in present]
    given = {n: tensors[n].detach().requires_grad_(n in wanted) for n in present}
    before = {n: t.clone() for n, t in tensors.items()}
    seed = torch.tensor([recipe.seed]) if settings.dropout_p else None
    with sorted_by_expert(recipe):
        y, logits = run(given, settings, seed)
        leading, dtype = recipe.leading, recipe.dtype
        assert y.shape == (*leading, recipe.shape.D_out) and y.dtype == dtype
        assert logits.shape == (*leading, recipe.shape.E) and logits.dtype == router_dtype(dtype)
        # Of rows that do not lie one after the other the frozen layer's product is made apart, of which the logits are
        # no part.
        apart = given["x"].dim() > 2 and not given["x"].is_contiguous() and "weight" in present
        routed = [n for n in wanted if not (apart and n in ("weight", "bias"))]
        assert y.requires_grad == bool(wanted) and logits.requires_grad == bool(routed)
        results = {"y": flat(y.detach()), "logits": flat(logits.detach())}
        arriving = [(out, n) for out, n in ((y, "dout"), (logits, "dlogits")) if n in recipe.incoming]
        if wanted:
            reached = [(out, tensors[n]) for out, n in arriving if out.requires_grad]
            grads = [torch.zeros_like(given[n]) for n in wanted]
            if reached:
                outs, douts = zip(*reached, strict=True)
                grads = torch.autograd.grad(outs, [given[n] for n in wanted], douts, materialize_grads=True)
            for name, grad in zip(wanted, grads, strict=True):
                assert grad.shape == given[name].shape and grad.dtype == given[name].dtype, name
                results[f"d{name}"] = flat(grad) if name == "x" else grad
    for name, tensor in tensors.items():
        assert identical(tensor, before[name]), f"{name} was written to"
    inputs = Inputs(*(flat(tensors[n]) if n == "x" else tensors[n] if n in present else None for n in GRADIENTS), seed)
    return Called(inputs, results, *(flat(tensors[n]) if n in recipe.incoming else None for n in ("dout", "dlogits")))


def run(given: dict[str, Tensor], settings: Settings, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """The operator, or its update alone where there is no weight."""
    options = settings._asdict() | {"seed": seed}
    adapter = [given[n] for n in GRADIENTS[3:]]
    if "weight" not in given:
        return mosld_delta(given["x"], *adapter, **options)
    return mosld_linear(given["x"], given["weight"], given.get("bias"), *adapter, **options)


@contextlib.contextmanager
def sorted_by_expert(recipe: Recipe):
    """Products over sorted tokens, in slices of seven features, where the recipe asks for them and the code may run"""
    asked = recipe.by_tokens and recipe.shape.T > 0 and recipe.shape.mixing == "expand"
    if not asked:
        yield
        return
    with (
        mock.patch.object(grouped, "faster_than_dense", lambda *sizes: True),
        mock.patch.object(grouped, "SLICE_BYTES", 0),
        mock.patch.object(grouped, "LEAST_SLICE", 7),
    ):
        yield
