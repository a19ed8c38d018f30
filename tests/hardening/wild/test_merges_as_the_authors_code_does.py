"""A merge with the rules of the authors' code, against loops in float64: of TIES, AdaMerging and Concrete.

Where code and paper differ both can be had, and each test shows that they do differ.
"""

from dataclasses import replace
from math import exp, log, sqrt
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mosld.cli import merge as merge_verb
from mosld.cli.main import build_parser
from mosld.merging import AdaptiveSettings, ConcreteSettings, Inputs, MergeSettings, TaskVector, merge
from mosld.merging.concrete import train_masks
from mosld.merging.dense import DenseMerge
from mosld.merging.elementwise import disjoint_mean, ties
from mosld.merging.vectors import Factors

# TIES. Two weights of 6 and 5 elements, whose magnitudes are all different within a vector.
TIES = {
    "a": [[3.0, -2.5, 0.125, 2.0, -0.25, 1.5], [-3.0, -0.5, 4.0, 0.375, 0.625, -1.0]],
    "b": [[1.25, -0.75, 0.0625, 1.75, -2.25], [1.75, 0.875, 2.0, 0.1875, 2.25]],
}


def ties_by_hand(keep: float) -> dict[str, list[float]]:
    """The merge of TIES as the authors' code has it, number by number."""
    names, flat = list(TIES), []
    for k in range(2):
        flat.append([value for name in names for value in TIES[name][k]])
    size = len(flat[0])
    trimmed = []
    for vector in flat:
        least = sorted(abs(value) for value in vector)[size - int(size * keep) - 1]
        trimmed.append([value if abs(value) >= least else 0.0 for value in vector])
        assert sum(value != 0 for value in trimmed[-1]) == int(size * keep) + 1
    signs = []
    for i in range(size):
        total = trimmed[0][i] + trimmed[1][i]
        signs.append((total > 0) - (total < 0))
    majority = (sum(signs) > 0) - (sum(signs) < 0)
    merged = []
    for i in range(size):
        elected = signs[i] or majority
        agreeing = []
        for vector in trimmed:
            if (vector[i] > 0) if elected > 0 else (vector[i] < 0):
                agreeing.append(vector[i])
        merged.append(sum(agreeing) / max(len(agreeing), 1))
    cut = len(TIES["a"][0])
    return {"a": merged[:cut], "b": merged[cut:]}


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.9])
def test_ties_keeps_one_element_more_and_elects_the_majority_where_vectors_cancel(keep):
    def walk():
        return ((name, torch.tensor(values)) for name, values in TIES.items())

    found = {name: disjoint_mean(parts).tolist() for name, parts in ties(walk, keep, "code")}
    assert found == ties_by_hand(keep)
    # 3 and -3 cancel in the first place: the paper's sign is none, the code's that of most elements.
    assert found["a"][0] == 3.0
    paper = {name: disjoint_mean(parts).tolist() for name, parts in ties(walk, keep)}
    assert paper["a"][0] == 0.0
    kept = sum(int((parts != 0).sum()) for _, parts in ties(walk, keep))
    assert kept < sum(int((parts != 0).sum()) for _, parts in ties(walk, keep, "code"))


@pytest.mark.parametrize(("values", "expected"), [([[2.0, 1.0], [-2.0, -1.0]], [-2.0, -1.0]), ([[0.0], [0.0]], [0.0])])
def test_where_nothing_elects_a_sign_the_code_keeps_what_is_negative(values, expected):
    ((_, parts),) = ties(lambda: [("w", torch.tensor(values))], 0.9, "code")
    assert disjoint_mean(parts).tolist() == expected


def test_a_merge_by_ties_takes_the_rule_and_refuses_another():
    up = torch.eye(4)
    vectors = []
    for name, values in (("x", [4.0, 3.0, 2.0, 1.0]), ("y", [4.0, 3.0, 2.0, -8.0])):
        factors = {"0": Factors(torch.tensor(values).diag(), up)}
        vectors.append(TaskVector(name, Path(name), factors=factors))
    base = nn.Sequential(nn.Linear(4, 4, bias=False))
    # 16 elements, a quarter is 4: all that are not zero. An eighth is 2, and 3 in the code.
    for rule, diagonal in (("paper", [4.0, 3.0, 0.0, -8.0]), ("code", [4.0, 3.0, 2.0, -8.0])):
        merged = merge(base, vectors, MergeSettings("ties", keep=0.125, ties_rule=rule))
        ((_, update),) = merged.updates(base)
        assert update.diagonal().tolist() == diagonal, rule
    with pytest.raises(ValueError, match="ties_rule must be one of paper, code, got 'theirs'"):
        MergeSettings("ties", ties_rule="theirs")


class TwoLayers(nn.Module):
    """x -> W2 tanh(W1 x), as a transformers model returns it"""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4, bias=False), nn.Linear(4, 3, bias=False)

    def forward(self, x):
        return SimpleNamespace(logits=self.second(self.first(x).tanh()))


WEIGHTS = ("first.weight", "second.weight")


def two_layers() -> tuple[TwoLayers, dict[str, torch.Tensor], list[Inputs]]:
    """The base, a weight's name -> two updates, and two tasks."""
    torch.manual_seed(0)
    model = TwoLayers()
    updates = {name: torch.randn(2, *model.get_parameter(name).shape) for name in WEIGHTS}
    tasks = [Inputs(name, {"x": 2 * torch.randn(5, 3)}) for name in "st"]
    return model, updates, tasks


def entropies(model, updates, tasks, coefficients, masks=None) -> torch.Tensor:
    """The sum over tasks of the mean entropy in float64; coefficients[weight][k], masks[weight][row][column]."""
    weights = []
    for i, name in enumerate(WEIGHTS):
        merged = model.get_parameter(name).detach().double()
        for k in range(2):
            update = updates[name][k].double()
            merged = merged + coefficients[i][k] * (update if masks is None else masks[name] * update)
        weights.append(merged)
    total = torch.zeros((), dtype=torch.float64)
    for task in tasks:
        for x in task.arguments["x"].double():
            logits = weights[1] @ (weights[0] @ x).tanh()
            p = logits.exp() / logits.exp().sum()
            total = total - (p * p.log()).sum() / len(task)
    return total


class Adam:
    """Of one number, in Python's floats."""

    def __init__(self, rate: float):
        self.rate, self.steps, self.mean, self.square = rate, 0, 0.0, 0.0

    def step(self, value: float, gradient: float) -> float:
        self.steps += 1
        self.mean = 0.9 * self.mean + 0.1 * gradient
        self.square = 0.999 * self.square + 0.001 * gradient**2
        size = sqrt(self.square / (1 - 0.999**self.steps)) + 1e-8
        return value - self.rate * (self.mean / (1 - 0.9**self.steps)) / size


def clamped(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def adamerging_by_hand(vectors, inputs, start: float, rate: float, steps: int) -> list[float]:
    """logits = sum_k clamp(lambda_k) v_k x of one number x, by the derivative of the entropy: -p_j (log p_j + H)."""
    raw, adams = [start] * len(vectors), [Adam(rate) for _ in vectors]
    for _ in range(steps):
        gradient = [0.0] * len(vectors)
        for x in inputs:
            logits = []
            for j in range(3):
                logits.append(sum(clamped(raw[k]) * vectors[k][j] * x for k in range(len(vectors))))
            total = sum(exp(logit) for logit in logits)
            p = [exp(logit) / total for logit in logits]
            entropy = -sum(q * log(q) for q in p)
            for k, vector in enumerate(vectors):
                if 0 <= raw[k] <= 1:
                    gradient[k] += sum(-p[j] * (log(p[j]) + entropy) * vector[j] * x for j in range(3)) / len(inputs)
        raw = [adams[k].step(raw[k], gradient[k]) for k in range(len(vectors))]
    return raw


def test_adamerging_clamps_where_it_merges_and_adam_goes_on_from_outside():
    vectors, inputs = [[2.0, -1.0, 0.5], [0.3, 0.2, -0.4]], [1.0, -0.7, 0.4]
    raw = adamerging_by_hand(vectors, inputs, start=0.9, rate=0.05, steps=12)
    assert raw[0] > 1.2  # momentum carries it on, where no gradient comes back
    tasks = [TaskVector(str(k), Path(str(k)), factors={"0": Factors(torch.ones(1, 1), torch.tensor([v]).T)})
             for k, v in enumerate(vectors)]  # fmt: skip
    unlabelled = [Inputs("t", {"input": torch.tensor(inputs).unsqueeze(1)})]
    base = Logits()
    found = {}
    for clamp in (False, True, "use"):
        adaptive = AdaptiveSettings(steps=12, learning_rate=0.05, clamp=clamp)
        merged = merge(base, tasks, MergeSettings("adamerging_task", 0.9, adaptive=adaptive), unlabelled)
        found[clamp] = merged.coefficients.tolist()
    assert found["use"] == pytest.approx([clamped(value) for value in raw], abs=1e-5)
    assert found[False][0] > 1 and found[True][0] == 1.0
    # The second coefficient tells the rules apart: the first one's momentum changes what it sees.
    assert max(abs(a - b) for a, b in zip(found[False], found["use"], strict=True)) > 1e-3
    with pytest.raises(ValueError, match="clamp must be False, True or 'use', got 'at use'"):
        AdaptiveSettings(clamp="at use")


class Logits(nn.Sequential):
    """One linear layer that starts at zero, as a transformers model returns its logits."""

    def __init__(self):
        super().__init__(nn.Linear(1, 3, bias=False))
        nn.init.zeros_(self[0].weight)

    def forward(self, input):
        return SimpleNamespace(logits=self[0](input))


def test_the_losses_are_of_the_model_that_is_merged_with_the_clamped_coefficient():
    """One coefficient that Adam drives out of [0, 1], and on."""
    vectors, inputs = [[3.0, -3.0, 0.0]], [1.0]
    raw = adamerging_by_hand(vectors, inputs, start=0.95, rate=0.1, steps=30)
    assert raw[0] > 1.3
    task = [TaskVector("k", Path("k"), factors={"0": Factors(torch.ones(1, 1), torch.tensor([vectors[0]]).T)})]
    unlabelled = [Inputs("t", {"input": torch.tensor([[1.0]])})]
    adaptive = AdaptiveSettings(steps=30, learning_rate=0.1, clamp="use")
    merged = merge(Logits(), task, MergeSettings("adamerging_task", 0.95, adaptive=adaptive), unlabelled)
    assert merged.coefficients.item() == 1.0
    p = [exp(3) / (exp(3) + exp(-3) + 1), exp(-3) / (exp(3) + exp(-3) + 1), 1 / (exp(3) + exp(-3) + 1)]
    assert merged.losses[-1] == pytest.approx(-sum(q * log(q) for q in p), abs=1e-6)


def masks_by_hand(model, updates, tasks, settings: ConcreteSettings) -> dict[str, torch.Tensor]:
    """The mask's logits after the steps of Concrete AdaMerging as its authors' code takes them."""
    generator = torch.Generator().manual_seed(settings.seed)
    phi = {name: torch.zeros(updates[name].shape[1:], dtype=torch.float64) for name in WEIGHTS}
    outer = {name: [Adam(settings.learning_rate) for _ in phi[name].flatten()] for name in WEIGHTS}
    inner = [[Adam(1.0) for _ in range(2)] for _ in WEIGHTS]
    coefficients = [[settings.start] * 2 for _ in WEIGHTS]

    def drawn(logits):
        masks = {}
        for name in WEIGHTS:
            u = torch.rand(logits[name].shape, generator=generator).clamp(1e-6, 1 - 1e-6).double()
            mask = 1 / (1 + (-((u / (1 - u)).log() + logits[name]) / settings.temperature).exp())
            masks[name] = mask / mask.mean()
        return masks

    for _ in range(settings.steps):
        # The gradient at the coefficients that the last step has left, and the step from the start.
        leaves = [[torch.tensor(one, dtype=torch.float64, requires_grad=True) for one in row] for row in coefficients]
        used = [[one.clamp(0, 1) if settings.clamp else one for one in row] for row in leaves]
        entropies(model, updates, tasks, used, drawn(phi)).backward()
        for i in range(len(WEIGHTS)):
            for k in range(2):
                gradient = float(leaves[i][k].grad)
                if settings.inner == "adam":
                    coefficients[i][k] = inner[i][k].step(settings.start, gradient)
                else:
                    coefficients[i][k] = settings.start - gradient
        logits = {name: phi[name].clone().requires_grad_() for name in WEIGHTS}
        moved = [[clamped(one) if settings.clamp else one for one in row] for row in coefficients]
        entropies(model, updates, tasks, moved, drawn(logits)).backward()
        for name in WEIGHTS:
            values = []
            for adam, value, gradient in zip(
                outer[name], phi[name].flatten().tolist(), logits[name].grad.flatten().tolist(), strict=True
            ):
                values.append(adam.step(value, gradient))
            phi[name] = torch.tensor(values, dtype=torch.float64).view_as(phi[name])
    return phi


@pytest.mark.parametrize(("inner", "clamp"), [("sgd", False), ("adam", False), ("adam", True)])
def test_concrete_adamerging_steps_from_the_start_with_the_gradient_of_the_last_coefficients(tmp_path, inner, clamp):
    model, updates, tasks = two_layers()
    dense = DenseMerge(model, updates.items())
    settings = ConcreteSettings(
        steps=4, learning_rate=0.1, inner_rate=1.0, inner=inner, inner_at="previous", clamp=clamp, by_layer=True,
        save_steps=1,
    )  # fmt: skip
    expected = masks_by_hand(model, updates, tasks, settings)
    found, losses = train_masks(dense, tasks, 2, settings)
    for name in WEIGHTS:
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-3, atol=1e-4)
    at_start, _ = train_masks(dense, tasks, 2, replace(settings, inner_at="start"))
    assert any((at_start[name] - found[name]).abs().max() > 1e-2 for name in WEIGHTS)
    # A run that was cut off goes on from the coefficients that it had.
    train_masks(dense, tasks, 2, replace(settings, steps=2), tmp_path)
    resumed, again = train_masks(dense, tasks, 2, settings, tmp_path)
    assert again == losses and all(torch.equal(resumed[name], found[name]) for name in WEIGHTS)


def test_a_concrete_merge_takes_these_settings_and_ends_with_a_drawn_mask(tmp_path):
    model, updates, tasks = two_layers()
    vectors = []
    for k in range(2):
        factors = {}
        for name in WEIGHTS:
            rows = updates[name][k]
            factors[name.removesuffix(".weight")] = Factors(rows, torch.eye(len(rows)))
        vectors.append(TaskVector(str(k), Path(str(k)), factors=factors))
    concrete = ConcreteSettings(steps=3, learning_rate=0.1, inner_at="previous", drawn=True, seed=4)
    adaptive = AdaptiveSettings(steps=1, clamp="use")
    merged = merge(model, vectors, MergeSettings("concrete_adamerging", adaptive=adaptive, concrete=concrete), tasks)
    phi = masks_by_hand(model, updates, tasks, replace(concrete, clamp=True))
    generator = torch.Generator().manual_seed(5)
    assert merged.masks is not None
    for name in WEIGHTS:
        u = torch.rand(phi[name].shape, generator=generator).double()
        mask = 1 / (1 + (-((u / (1 - u)).log() + phi[name]) / 0.5).exp())
        torch.testing.assert_close(merged.masks[name].double(), mask / mask.mean(), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="inner_at must be start or previous, got 'end'"):
        ConcreteSettings(inner_at="end")
    with pytest.raises(ValueError, match="discrete=True contradicts drawn=True"):
        ConcreteSettings(discrete=True, drawn=True)


def test_the_command_line_has_them():
    def settings(*words):
        words = ["merge", "--method", "concrete_adamerging", "--output", "o", *words, "a", "b"]
        return merge_verb.merge_settings(build_parser().parse_args(words))

    plain = settings()
    assert (plain.ties_rule, plain.adaptive.clamp, plain.concrete.inner_at, plain.concrete.drawn) == (
        "paper", False, "start", False,
    )  # fmt: skip
    code = settings("--ties-rule", "code", "--inner-at", "previous", "--drawn", "--clamp-at-use")
    assert (code.ties_rule, code.adaptive.clamp, code.concrete.inner_at, code.concrete.drawn) == (
        "code", "use", "previous", True,
    )  # fmt: skip
    assert settings("--clamp").adaptive.clamp is True
