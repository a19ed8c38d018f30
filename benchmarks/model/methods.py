"""A model, not a measurement: what an adapter adds to a frozen linear layer, by bytes, FLOP and two device rates.

    time = max(FLOP / FLOP per s, bytes / bytes per s) of each step        pass = one read or write of a 16-bit tensor

A pass over x moves 2 T D_in bytes, one over out 2 T D_out. The frozen layer is one product forward and one backward
(dx alone). Left out: launches, hits in the L2 cache, tiles read again inside products, atomics.
"""

from collections.abc import Callable
from typing import NamedTuple

ELEMENT_BYTES = 2  # bfloat16 and float16
# Tensor cores take ranks in multiples of this.
MMA_WIDTH = 16
US = 1e6


class Device(NamedTuple):
    """Rates per second: 16-bit matrix FLOP, bytes to and from memory, 32-bit integer instructions. Then what decides
    how the kernels cut their sums: the architecture (90 is sm_90) and the number of multiprocessors."""

    flops: float
    bandwidth: float
    integer_ops: float
    arch: int
    processors: int


# Matrix and copy rates are measured on an H200, and assumed for the others.
# Integer rates are multiprocessors x 64 lanes x boost clock.
DEVICES = {
    "H200": Device(790e12, 4.3e12, 132 * 64 * 1.755e9, 90, 132),
    "H100": Device(700e12, 3.0e12, 132 * 64 * 1.755e9, 90, 132),
    "A100": Device(270e12, 1.75e12, 108 * 64 * 1.41e9, 80, 108),
}


class Problem(NamedTuple):
    """One adapted layer on one device: T tokens, D_in and D_out features, R rank, E experts, K chosen. Times in us."""

    device: Device
    T: int = 8192
    D_in: int = 4096
    D_out: int = 4096
    R: int = 16
    E: int = 8
    K: int = 2
    dropout: bool = True
    element_bytes: int = ELEMENT_BYTES

    def time_us(self, flops: float, moved_bytes: float, integer_ops: float = 0.0) -> float:
        """Whichever of the three takes longest."""
        rates = self.device
        return max(flops / rates.flops, moved_bytes / rates.bandwidth, integer_ops / rates.integer_ops) * US

    @property
    def base(self) -> float:
        """The frozen layer in one direction."""
        elements = self.T * self.D_in + self.T * self.D_out + self.D_in * self.D_out
        return self.time_us(2 * self.T * self.D_in * self.D_out, self.element_bytes * elements)

    @property
    def x(self) -> float:
        """One pass over x."""
        return self.time_us(0, self.element_bytes * self.T * self.D_in)

    @property
    def out(self) -> float:
        """One pass over out."""
        return self.time_us(0, self.element_bytes * self.T * self.D_out)

    @property
    def token_dropout(self) -> float:
        """Dropout on x in eager torch, either direction: a read, a write, and a mask of one byte an element."""
        return (2 + 1 / self.element_bytes) * self.x if self.dropout else 0.0

    def expand(self, passes: int) -> float:
        """The product between [T, E * R] and [T, D_out]: its arithmetic, or this many passes over out."""
        return self.time_us(
            2 * self.T * self.D_out * self.E * self.R, passes * self.element_bytes * self.T * self.D_out
        )

    def extension(self, columns: int, contraction: int) -> float:
        """Lengthening the sums of the base product, `contraction` long, by this many columns."""
        return self.base * columns / contraction


def ceil_div(size: int, block: int) -> int:
    """How many blocks hold `size` elements."""
    return -(-size // block)


def padded(columns: int) -> int:
    """The next multiple of what tensor cores take."""
    return ceil_div(columns, MMA_WIDTH) * MMA_WIDTH


# Each of the following methods returns what it adds to the frozen layer, (forward, backward) in us.


def peft_eager(p: Problem) -> tuple[float, float]:
    """One LoRA: dropout on x, A reads it, B writes, the scale is a round trip, the sum reads two and writes one."""
    forward = p.token_dropout + p.x + p.out + 2 * p.out + 3 * p.out
    # In this order: scale; dB and dhidden read dout; dA reads x; dhidden A is written; dropout; the sum into dx.
    backward = 2 * p.out + 2 * p.out + p.x + p.x + p.token_dropout + 3 * p.x
    return forward, backward


def peft_compiled(p: Problem) -> tuple[float, float]:
    """The same with chains of elementwise steps fused by torch.compile; the dropped x is still written."""
    dropped = p.x if p.dropout else 0.0
    return 2 * dropped + p.x + 4 * p.out, 2 * p.out + 5 * p.x + dropped


def expert_loop(p: Problem) -> tuple[float, float]:
    """HydraLoRA's published loop: dropout, A, B, gate, scale and sum once per expert, and a router."""
    forward = p.token_dropout + p.x + p.out + 2 * p.out + 2 * p.out + 3 * p.out
    backward = 2 * p.out + 3 * p.out + 2 * p.out + 2 * p.x + p.token_dropout + 3 * p.x
    return p.E * forward + p.x, p.E * backward + 5 * p.x


def accumulate_after(p: Problem) -> tuple[float, float]:
    """One LoRA without dropout in closed form, accumulated onto the base product's out, as fused LoRA libraries do."""
    return p.x + 2 * p.out, 2 * p.out + p.x + p.x + 2 * p.x


def packed_token_dropout(p: Problem) -> tuple[float, float]:
    """Plain torch with A shared and B packed, dropout on x: down, router, one product added onto out."""
    forward = p.token_dropout + 2 * p.x + p.expand(passes=2)
    return forward, 2 * p.expand(passes=1) + 4 * p.x + p.token_dropout + 3 * p.x


def packed_a_dropout(p: Problem) -> tuple[float, float]:
    """The same with dropout on the elements of A, which costs nothing of the size of x."""
    return 2 * p.x + p.expand(passes=2), 2 * p.expand(passes=1) + 2 * p.x + 4 * p.x


def lorafusion(p: Problem) -> tuple[float, float]:
    """LoRAFusion with one LoRA: the adapter inside the base products, the dropped x and a mask stored."""
    mask = p.x / 2 if p.dropout else 0.0
    forward = p.token_dropout + p.x + p.extension(p.R, p.D_in)
    return forward, p.out + p.x + mask + p.extension(p.R, p.D_out)


def ours(p: Problem) -> tuple[float, float]:
    """This library: the update is stored, the base product accumulates onto it and hides its read of out."""
    return p.x + p.expand(passes=1), 2 * p.expand(passes=1) + 2 * p.x


def extended_product(p: Problem) -> tuple[float, float]:
    """The expansion inside a base product of one's own that is as fast as the library's."""
    forward = p.x + p.extension(padded(p.E * p.R), p.D_in)
    return forward, 2 * p.expand(passes=1) + p.x + p.extension(padded(p.R + p.E), p.D_out)


def floor(p: Problem) -> tuple[float, float]:
    """x read once forward, dout and x once backward, arithmetic for the chosen experts alone."""
    forward = p.x + p.extension(padded(p.K * p.R), p.D_in)
    return forward, p.out + p.x + p.extension(padded(p.R + p.E), p.D_out)


METHODS: dict[str, Callable[[Problem], tuple[float, float]]] = {
    "PEFT LoRA, eager": peft_eager,
    "PEFT LoRA, compiled": peft_compiled,
    "loop over experts": expert_loop,
    "packed torch, dropout on x": packed_token_dropout,
    "packed torch, dropout on A": packed_a_dropout,
    "LoRAFusion, one LoRA": lorafusion,
    "ours": ours,
    "inside an ideal base product": extended_product,
    "floor": floor,
}


def method_table(p: Problem) -> list[dict]:
    """-> one row a method: what it adds forward and backward, in us and in percent of the frozen layer, as bytes and as
    passes over x, and the FLOP of its products. A model."""
    return [_method_row(name, method, p) for name, method in METHODS.items()]


def _method_row(name: str, method: Callable[[Problem], tuple[float, float]], p: Problem) -> dict:
    forward_us, backward_us = method(p)
    forward_bytes, backward_bytes = moved_bytes(method, p)
    pass_bytes = p.element_bytes * p.T * p.D_in
    flops = added_flops(name, p)
    return {
        "method": name,
        "model_forward_us": forward_us,
        "model_backward_us": backward_us,
        "model_forward_percent": 100 * forward_us / p.base,
        "model_backward_percent": 100 * backward_us / p.base,
        "model_both_percent": 100 * ((forward_us + backward_us) / 2) / p.base,
        "forward_bytes": forward_bytes,
        "forward_passes": forward_bytes / pass_bytes,
        "forward_flops": flops,
        "backward_bytes": backward_bytes,
        "backward_passes": backward_bytes / pass_bytes,
        "backward_flops": 2 * flops,
    }


def moved_bytes(method: Callable[[Problem], tuple[float, float]], p: Problem) -> tuple[float, float]:
    """What the method moves forward and backward: its time where arithmetic costs nothing. An extension of the base
    product moves its columns' share of that product's bytes."""
    free = p._replace(device=p.device._replace(flops=float("inf"), integer_ops=float("inf")))
    forward_us, backward_us = method(free)
    return forward_us / US * p.device.bandwidth, backward_us / US * p.device.bandwidth


def added_flops(name: str, p: Problem) -> int:
    """Multiplications and additions of the method's products in forward; backward has twice as many, a product for
    either gradient of each."""
    lora, router = 2 * p.T * p.R * (p.D_in + p.D_out), 2 * p.T * p.E * p.D_in
    if name == "loop over experts":
        return p.E * lora + router
    if "LoRA" in name:
        return lora
    experts = p.K if name == "floor" else p.E
    return 2 * p.T * p.D_in * p.R + router + 2 * p.T * p.D_out * experts * p.R


def dense_limit(device: Device) -> float:
    """E * R above which a dense expansion takes longer to compute than to write."""
    return device.flops / device.bandwidth


def extension_limit_percent(device: Device, D_in: int, passes_saved: int = 1) -> float:
    """How much slower than the library's, in percent, a base product may be that saves so many passes over out."""
    return 100 * passes_saved * device.flops / (D_in * device.bandwidth)
