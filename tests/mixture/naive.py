"""Every method as its paper writes it: loops over rows, tokens, experts and ranks, nothing of the library.

Of one token: x [D_in] as the router sees it, dropped [D_in] as A sees it; A [R_in, D_in], B [D_out, R_out], router,
tasks and mixer as the layer has them; hidden [R_in], what the dropout on z multiplies it by; row, all of x's tokens.
All take a Token and return the update [D_out].
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Token:
    x: Tensor
    dropped: Tensor
    row: Tensor  # [tokens, D_in]
    A: Tensor
    undropped_a: Tensor
    B: Tensor
    router: Tensor | None
    tasks: Tensor | None
    mixer: Tensor | None
    hidden: Tensor
    r: int
    s: float
    E: int
    k: int
    task: int = 0
    prior: Tensor | None = None  # [n]
    gates: Tensor | None = None  # [n]
    options: dict[str, Any] = field(default_factory=dict)

    def down(self, first: int, last: int) -> Tensor:
        """Rows first to last of A times the token, after the dropout on z."""
        return torch.stack([self.hidden[i] * (self.A[i] * self.dropped).sum() for i in range(first, last)])


def softmax(logits: list[Tensor]) -> list[Tensor]:
    exponentials = [(logit - max(float(other.detach()) for other in logits)).exp() for logit in logits]
    return [one / sum(exponentials) for one in exponentials]


def logits(router: Tensor, x: Tensor) -> list[Tensor]:
    return [(row * x).sum() for row in router]


def order(values: list[Tensor]) -> list[int]:
    """Indices from the largest down, equal ones by index."""
    return sorted(range(len(values)), key=lambda e: (-float(values[e].detach()), e))


def top_k(probabilities: list[Tensor], k: int) -> dict[int, Tensor]:
    chosen = order(probabilities)[:k]
    total = sum(probabilities[e] for e in chosen)
    return {e: probabilities[e] / total for e in chosen}


def top_p(probabilities: list[Tensor], p: float) -> dict[int, Tensor]:
    chosen: list[int] = []
    for e in order(probabilities):
        if sum(float(probabilities[c].detach()) for c in chosen) < p:
            chosen.append(e)
    total = sum(probabilities[e] for e in chosen)
    return {e: probabilities[e] / total for e in chosen}


def _shared_a(t: Token, gates: dict[int, Tensor]) -> Tensor:
    """s sum_e g_e B_e A x"""
    z = t.down(0, t.r)
    return t.s * sum(g * (t.B[:, e * t.r : (e + 1) * t.r] @ z) for e, g in gates.items())


def _own_a(t: Token, gates: dict[int, Tensor]) -> Tensor:
    """s sum_e g_e B_e A_e x"""
    parts = [slice(e * t.r, (e + 1) * t.r) for e in range(t.E)]
    return t.s * sum(g * (t.B[:, parts[e]] @ t.down(parts[e].start, parts[e].stop)) for e, g in gates.items())


def _dense(probabilities: list[Tensor]) -> dict[int, Tensor]:
    return dict(enumerate(probabilities))


def lora(t: Token) -> Tensor:
    return t.s * (t.B @ t.down(0, t.r))


def mosld(t: Token) -> Tensor:
    return _shared_a(t, top_k(softmax(logits(t.router, t.x)), t.k))


mosl = mosld


def mosld_up(t: Token) -> Tensor:
    """s B sum_k g_k A_k x"""
    gates = top_k(softmax(logits(t.router, t.x)), t.k)
    return t.s * (t.B @ sum(g * t.down(e * t.r, (e + 1) * t.r) for e, g in gates.items()))


def hydralora(t: Token) -> Tensor:
    return _shared_a(t, _dense(softmax(logits(t.router, t.x))))


def mola(t: Token) -> Tensor:
    return _own_a(t, top_k(softmax(logits(t.router, t.x)), t.k))


moelora = mola


def loramoe(t: Token) -> Tensor:
    return _own_a(t, _dense(softmax(logits(t.router, t.x))))


def moelora_medical(t: Token) -> Tensor:
    return _own_a(t, _dense(softmax(logits(t.router, t.tasks[t.task]))))


def malora(t: Token) -> Tensor:
    """s sum_k g_k B_k P_k A x"""
    z, up = t.down(0, t.r), t.options["r_up"]
    gates = top_k(softmax(logits(t.router, t.x)), t.k)
    return t.s * sum(g * (t.B[:, e * up : (e + 1) * up] @ (t.mixer[e] @ z)) for e, g in gates.items())


def mtl_lora(t: Token) -> Tensor:
    """s sum_i softmax(w_t / 0.1)_i B_i L_t A x"""
    z = t.mixer[t.task] @ t.down(0, t.r)
    gates = softmax([logit / 0.1 for logit in t.router[t.task]])
    return t.s * sum(g * (t.B[:, i * t.r : (i + 1) * t.r] @ z) for i, g in enumerate(gates))


def mode(t: Token) -> Tensor:
    """sum_i sum_j R_ij(x) (a_j x) b_ij, a softmax over i for every group of ranks"""
    z, p = t.down(0, t.r), t.options["group_size"]
    all_logits = logits(t.router, t.x)
    total = torch.zeros_like(t.B[:, 0])
    for j in range(t.r):
        group = j // p
        gates = softmax(all_logits[group * t.E : (group + 1) * t.E])
        for i in range(t.E):
            total = total + t.s * gates[i] * z[j] * t.B[:, i * t.r + j]
    return total


def mor1e(t: Token) -> Tensor:
    """sigma(100 b) sum_ij M_ij (a_i x) b_j,  M = w n softmax + (1 - w) 4 rho,  w = sigma(100 v)"""
    z, up = t.down(0, t.r), t.options["r_up"]
    weight, gain = torch.sigmoid(100 * t.mixer[0]), torch.sigmoid(100 * t.mixer[1])
    probabilities = softmax(logits(t.router, t.x))
    total = torch.zeros_like(t.B[:, 0])
    for j in range(up):
        for i in range(t.r):
            pair = j * t.r + i if t.options["slow_index"] == "r_up" else i * up + j
            m = weight * t.r * up * probabilities[pair]
            if t.prior is not None:
                m = m + (1 - weight) * 4 * t.prior[pair]
            total = total + t.s * gain * m * z[i] * t.B[:, j]
    return total


def mixlora_conditional(t: Token) -> Tensor:
    """s sum_q b_(q-th of B) (a_(q-th of A) x); with straight_through each choice is differentiated as a softmax"""
    mean = sum(t.row) / len(t.row)
    both = logits(t.router, mean)
    of_a, of_b = both[: t.E], both[t.E :]

    def choices(scores: list[Tensor]) -> list[list[Tensor]]:
        """For each q the weights of all entries: 1 for the q-th largest, 0 for the others."""
        soft, ranked = softmax(scores), order(scores)
        rows = []
        for q in range(t.r):
            hard = [torch.tensor(float(e == ranked[q]), dtype=mean.dtype) for e in range(t.E)]
            if t.options.get("straight_through", True):
                hard = [h + (p - p.detach()) for h, p in zip(hard, soft, strict=True)]
            rows.append(hard)
        return rows

    rows = choices(of_a)
    if t.options.get("conditional", True):
        given = []
        for q in range(t.r):
            selected = sum(rows[q][e] * t.undropped_a[e] for e in range(t.E))
            if t.options["selector"] == "sums":  # released: the sum of the row times the sum of the weight
                size = len(selected)
                of_weight = [t.mixer[e, q * size : (q + 1) * size].sum() for e in range(t.E)]
                given.append(softmax([selected.sum() * of_weight[e] for e in range(t.E)]))
            else:
                given.append(softmax([(t.mixer[q][:, e] * selected).sum() for e in range(t.E)]))
        conditional = softmax([sum(one[e] for one in given) for e in range(t.E)])
        own, more = softmax(of_b), t.options.get("conditional_weight", 1.0)
        of_b = [(own[e] + more * conditional[e]).log() for e in range(t.E)]
    columns = choices(of_b)
    z = t.down(0, t.E)
    total = torch.zeros_like(t.B[:, 0])
    for q in range(t.r):
        for a in range(t.E):
            for b in range(t.E):
                total = total + t.s * columns[q][b] * rows[q][a] * z[a] * t.B[:, b]
    return total


# What no preset names, and the fields of MoSLDConfig can say.


def top_p_routed(t: Token) -> Tensor:
    return _shared_a(t, top_p(softmax(logits(t.router, t.x)), t.options["top_p"]))


def routed_on_hidden(t: Token) -> Tensor:
    """The router reads z, temperature 0.5."""
    scores = logits(t.router, t.down(0, t.r))
    return _shared_a(t, top_k(softmax([score / 0.5 for score in scores]), t.k))


def mosld_at_temperature(t: Token) -> Tensor:
    """Temperature 0.5."""
    return _shared_a(t, top_k(softmax([score / 0.5 for score in logits(t.router, t.x)]), t.k))


def routed_on_the_mean(t: Token) -> Tensor:
    return _own_a(t, top_k(softmax(logits(t.router, sum(t.row) / len(t.row))), t.k))


def constant(t: Token) -> Tensor:
    return _own_a(t, _dense(list(t.router[0])))


def external(t: Token) -> Tensor:
    return _own_a(t, _dense(list(t.gates)))


def external_reduced(t: Token) -> Tensor:
    return t.s * (t.B @ sum(t.gates[e] * t.down(e * t.r, (e + 1) * t.r) for e in range(t.E)))


def routed_cores_of_tasks(t: Token) -> Tensor:
    """Gates by token, cores by task."""
    z = t.mixer[t.task] @ t.down(0, t.r)
    gates = top_k(softmax(logits(t.router, t.x)), t.k)
    return t.s * sum(g * (t.B[:, e * t.r : (e + 1) * t.r] @ z) for e, g in gates.items())
