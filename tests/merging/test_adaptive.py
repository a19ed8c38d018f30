"""Coefficients and masks that unlabelled data decides."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mosld.merging import MergeSettings, TaskVector, merge
from mosld.merging.adaptive import AdaptiveSettings, minimise_entropy
from mosld.merging.concrete import (
    ConcreteSettings,
    final,
    inner_step,
    rescaled,
    sampled,
    sum_of_entropies,
    train_masks,
)
from mosld.merging.dense import DenseMerge, kept, write
from mosld.merging.elementwise import summed
from mosld.merging.unlabelled import Inputs, Question, Questions, batches, entropy, without_labels
from mosld.merging.vectors import Factors
from mosld.tasks.encode import Encoded, Encoder
from mosld.tasks.examples import Example, Task
from mosld.tasks.scoring import log_likelihoods
from tests.helpers.models import tiny_llama
from tests.tasks.test_scoring import byte_tokenizer

TOKENIZER = byte_tokenizer()
ENCODER = Encoder(TOKENIZER, 64)


def task(name: str, count: int = 8) -> Task:
    items = [Example.multiple_choice(f"{name}{i}?", ["ab", "cde", "f"][: 2 + i % 2], i % 2) for i in range(count)]
    return Task(name, [], items)


TASKS = [without_labels(ENCODER, task(name)) for name in "xy"]


def base():
    return tiny_llama(vocab_size=len(TOKENIZER)).eval()


def vectors(model) -> list[tuple[str, torch.Tensor]]:
    names = [n for n, _ in model.named_parameters() if n.endswith(("q_proj.weight", "up_proj.weight"))]
    torch.manual_seed(3)
    return [(n, 0.3 * torch.randn(2, *model.get_parameter(n).shape)) for n in names]


def test_questions_hold_no_answer():
    (question, *_) = TASKS[0].questions
    assert vars(question).keys() == {"choices"}
    turned = Task("x", [], [replace(e, answer=0) for e in task("x").test])
    assert without_labels(ENCODER, turned) == TASKS[0]  # whichever is right, the questions are the same
    both = Task("x", task("z", 3).test, task("x").test)
    assert without_labels(ENCODER, both) == TASKS[0]  # the test examples' where there are any
    assert without_labels(ENCODER, Task("x", task("x").test, [])) == TASKS[0]
    assert without_labels(ENCODER, both, 3).questions == TASKS[0].questions[:3]


@torch.no_grad()
def test_the_entropy_is_that_of_the_choices_likelihoods():
    model = base()
    model.lm_head.weight.mul_(30)  # of a model that is undecided every token counts alike
    own = TASKS[0].entropy(lambda **arguments: model(**arguments).logits, range(len(TASKS[0])))
    expected = []
    for question in TASKS[0].questions:
        sums = torch.tensor([total for total, _ in log_likelihoods(model, question.choices, ENCODER.pad)])
        expected.append(torch.distributions.Categorical(logits=sums).entropy())
    torch.testing.assert_close(own, torch.stack(expected).mean(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("one", "other"), [([5, 7, 9], [4, 7, 9]), ([5, 7], [5, 6]), ([5], [4])])
def test_every_token_of_an_answer_counts(one, other):
    """Those that a question's choices share cancel, and with bytes for tokens that is a blank before each."""
    model, choices = base(), (Encoded([1, 2, 3], one), Encoded([1, 2, 3], other))
    model.lm_head.weight.mul_(30)
    own = Questions("x", (Question(choices),), pad=0).entropy(lambda **given: model(**given).logits, [0])
    sums = torch.tensor([total for total, _ in log_likelihoods(model, choices, 0)])
    torch.testing.assert_close(own, torch.distributions.Categorical(logits=sums).entropy(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_dense_merge_is_the_model_with_the_sum_added():
    model, coefficients = base(), torch.tensor([0.5, -0.25])
    merge = DenseMerge(model, vectors(model))
    other = base()
    for name, update in summed(lambda: vectors(other), coefficients):
        other.get_parameter(name).add_(update)
    ids = torch.randint(0, len(TOKENIZER), (2, 6))
    expected = other(ids).logits
    torch.testing.assert_close(merge(coefficients)(input_ids=ids), expected)
    by_layer = coefficients.expand(len(merge.layers), 2)
    torch.testing.assert_close(merge(by_layer)(input_ids=ids), expected)
    assert not torch.allclose(model(ids).logits, expected, atol=1e-3)  # left as it is
    before = model(ids).logits
    with kept(model, merge.layers):
        assert write(model, merge.updates(coefficients)) < 1e-6
        torch.testing.assert_close(model(ids).logits, expected)
    assert torch.equal(model(ids).logits, before)


@torch.no_grad()
def test_every_layer_is_merged_by_its_own_coefficients_and_mask_and_so_it_is_written():
    model = base()
    taus = dict(vectors(model))
    merge = DenseMerge(model, taus.items())
    coefficients = torch.randn(len(taus), 2)
    masks = {name: torch.rand(tau.shape[1:]) for name, tau in taus.items()}
    for own in (None, masks):
        updates = dict(merge.updates(coefficients, own))
        assert updates.keys() == taus.keys()
        for (name, tau), (a, b) in zip(taus.items(), coefficients.tolist(), strict=True):
            expected = a * tau[0] + b * tau[1]
            torch.testing.assert_close(updates[name], expected if own is None else own[name] * expected)
    ids = torch.randint(0, len(TOKENIZER), (2, 6))
    run = merge(coefficients, masks)(input_ids=ids)
    write(model, merge.updates(coefficients, masks))
    torch.testing.assert_close(model(ids).logits, run)


@pytest.mark.parametrize("by_layer", [False, True])
def test_the_entropy_falls_and_a_run_that_was_cut_off_goes_on_exactly(tmp_path, by_layer):
    model = base()
    merge = DenseMerge(model, vectors(model))
    shape = (len(merge.layers), 2) if by_layer else (2,)
    settings = AdaptiveSettings(steps=6, learning_rate=0.05, batch_size=8, save_steps=3)
    whole, losses = minimise_entropy(merge, shape, TASKS, settings)
    assert losses[-1] < losses[0] and (whole != 0.3).all()
    minimise_entropy(merge, shape, TASKS, replace(settings, steps=3), tmp_path)
    resumed, again = minimise_entropy(merge, shape, TASKS, settings, tmp_path)
    assert torch.equal(resumed, whole) and again == losses
    with pytest.raises(ValueError, match="needs unlabelled data of at least one task"):
        minimise_entropy(merge, shape, [])


def test_a_run_that_goes_on_sees_the_questions_that_come_next(tmp_path):
    """In batches of three of eight questions, where a step depends on which they are."""
    model = base()
    model.lm_head.weight.data.mul_(10)
    merge = DenseMerge(model, vectors(model))
    settings = AdaptiveSettings(steps=4, learning_rate=0.05, batch_size=3, save_steps=1)
    whole, losses = minimise_entropy(merge, (2,), TASKS, settings)
    assert len(set(losses)) == 4
    minimise_entropy(merge, (2,), TASKS, replace(settings, steps=1), tmp_path)
    resumed, again = minimise_entropy(merge, (2,), TASKS, settings, tmp_path)
    assert torch.equal(resumed, whole) and again == losses


def test_other_settings_begin_anew(tmp_path):
    model = base()
    merge = DenseMerge(model, vectors(model))
    before = AdaptiveSettings(steps=2, learning_rate=0.05, batch_size=8, save_steps=1)
    minimise_entropy(merge, (2,), TASKS, before, tmp_path)
    after = replace(before, learning_rate=0.1, steps=3)
    anew, losses = minimise_entropy(merge, (2,), TASKS, after, tmp_path)
    expected, alone = minimise_entropy(merge, (2,), TASKS, after)
    assert torch.equal(anew, expected) and losses == alone


def test_a_relaxed_mask_becomes_the_discrete_one_as_the_temperature_falls():
    torch.manual_seed(0)
    logits = {"w": torch.randn(50, 40)}
    discrete = final(logits, 0.5, discrete=True)["w"]
    assert torch.equal(discrete, rescaled((logits["w"] > 0).float()))
    torch.testing.assert_close(final(logits, 1e-6)["w"], discrete, rtol=1e-3, atol=1e-3)
    drawn = sampled(logits, 0.5, torch.Generator().manual_seed(0))["w"]
    assert drawn.mean() == pytest.approx(1.0, rel=1e-4)
    kept = sampled({"w": torch.full((200, 200), 1.0)}, 1e-4, torch.Generator().manual_seed(0))["w"] > 0
    assert kept.float().mean() == pytest.approx(torch.sigmoid(torch.tensor(1.0)).item(), abs=0.01)


@pytest.mark.parametrize("inner_rate", [None, 1.0])
def test_masks_are_trained_by_the_entropy_and_repeat_with_the_seed(inner_rate):
    model = base()
    merge = DenseMerge(model, vectors(model))
    settings = ConcreteSettings(steps=3, learning_rate=0.1, batch_size=8, inner_rate=inner_rate)
    masks, losses = train_masks(merge, TASKS, 2, settings)
    assert len(losses) == 3 and all((phi != 0).any() for phi in masks.values())
    again, _ = train_masks(merge, TASKS, 2, settings)
    assert all(torch.equal(masks[name], again[name]) for name in masks)


def test_the_inner_step_goes_down_the_slope_of_the_coefficients_with_the_mask_held():
    model = base()
    model.lm_head.weight.data.mul_(10)
    merge = DenseMerge(model, vectors(model))
    masks = sampled(
        {n: torch.zeros(t.shape[1:]) for n, t in merge.parts.items()}, 0.5, torch.Generator().manual_seed(0)
    )
    everything = [iter([range(len(task))] * 9) for task in TASKS]
    coefficients = torch.tensor([5.0, 5.0], requires_grad=True)  # wherever the last step has left them
    inner_step(merge, masks, coefficients, torch.optim.SGD([coefficients], lr=2.0), TASKS, everything, start=0.3)
    slope = []
    for k in range(2):
        ends = [torch.full((2,), 0.3).index_add(0, torch.tensor([k]), torch.tensor([step])) for step in (1e-3, -1e-3)]
        with torch.no_grad():
            losses = [sum_of_entropies(merge(c, masks), TASKS, everything) for c in ends]
        slope.append((losses[0] - losses[1]) / 2e-3)
    torch.testing.assert_close(coefficients.detach(), 0.3 - 2.0 * torch.stack(slope), rtol=1e-2, atol=1e-3)
    assert (coefficients - 0.3).abs().max() > 1e-2


@pytest.mark.parametrize("inner", ["adam", "sgd"])
def test_masks_learn_with_the_moved_coefficients_and_a_run_that_was_cut_off_goes_on_exactly(tmp_path, inner):
    merge = DenseMerge(model := base(), vectors(model))
    settings = ConcreteSettings(steps=4, batch_size=4, learning_rate=0.1, inner_rate=1.0, inner=inner, save_steps=2)
    whole, losses = train_masks(merge, TASKS, 2, settings)
    train_masks(merge, TASKS, 2, replace(settings, steps=2), tmp_path)
    resumed, again = train_masks(merge, TASKS, 2, settings, tmp_path)
    assert again == losses and all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert train_masks(merge, TASKS, 2, replace(settings, inner_rate=None))[1] != losses
    by_layer, _ = train_masks(merge, TASKS, 2, replace(settings, by_layer=True))
    assert any(not torch.equal(by_layer[name], whole[name]) for name in whole)


def test_a_loss_that_is_no_number_ends_the_descent_and_says_where():
    model = base()
    merge = DenseMerge(model, [(n, torch.full_like(t, float("inf"))) for n, t in vectors(model)])
    with pytest.raises(ArithmeticError, match="the loss is nan at step 0"):
        minimise_entropy(merge, (2,), TASKS, AdaptiveSettings(steps=2))


def test_batches_are_decided_by_the_seed_and_cover_every_place():
    seen = [place for _, batch in zip(range(3), batches(6, 2, 5), strict=False) for place in batch]
    assert sorted(seen) == list(range(6)) and seen != list(range(6))
    assert seen == [place for _, batch in zip(range(3), batches(6, 2, 5), strict=False) for place in batch]


class Classifier(torch.nn.Module):
    """x -> W x, as a transformers model returns it"""

    def __init__(self, weight):
        super().__init__()
        self.head = torch.nn.Linear(*weight.T.shape, bias=False)
        self.head.weight.data = weight

    def forward(self, x):
        return SimpleNamespace(logits=self.head(x))


def test_a_classifiers_coefficient_is_the_one_with_the_least_entropy():
    """One vector on a linear model. Inputs e_1 give logits (l, 0), so that the entropy falls for ever with l.

    Two inputs that pull in opposite ways, with logits (1 - l, 0) and (l, 0), have their least sum at an end, and their
    greatest at 1/2.
    """
    vector = torch.tensor([[[1.0, -1.0], [0.0, 0.0]]])
    model = Classifier(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    merge = DenseMerge(model, [("head.weight", vector)])
    task = Inputs("t", {"x": torch.eye(2)})
    expected = entropy(torch.tensor([[0.3, 0.0], [0.7, 0.0]])).mean()
    assert task.entropy(merge(torch.tensor([0.3])), [0, 1]) == pytest.approx(expected.item())
    settings = AdaptiveSettings(steps=200, learning_rate=0.02)
    for start, end in ((0.3, -1.0), (0.7, 2.0)):  # away from 1/2, on either side
        found, losses = minimise_entropy(merge, (1,), [task], replace(settings, start=start))
        assert (found < end).all() if start < 0.5 else (found > end).all()
        assert losses[-1] < losses[0]
    clamped, _ = minimise_entropy(merge, (1,), [task], replace(settings, start=0.7, clamp=True))
    assert clamped.item() == 1.0
    # Logits (l, 0) and (8 - l, 0): both are certain enough for the entropy to be convex between, and 4 is best by
    # symmetry.
    merge = DenseMerge(Classifier(torch.tensor([[0.0, 8.0], [0.0, 0.0]])), [("head.weight", vector)])
    for start in (3.0, 5.0):
        found, _ = minimise_entropy(merge, (1,), [task], replace(settings, start=start, steps=400))
        assert found.item() == pytest.approx(4.0, abs=0.05)


def test_unlabelled_inputs_refuse_labels():
    with pytest.raises(ValueError, match="must have no labels, got labels"):
        Inputs("t", {"x": torch.eye(2), "labels": torch.zeros(2)})
    with pytest.raises(ValueError, match="must be of one length, got"):
        Inputs("t", {"x": torch.eye(2), "y": torch.eye(3)})


def test_a_merge_goes_on_from_its_folder_whose_name_may_be_text(tmp_path):
    model = Classifier(torch.randn(5, 6))
    adapters = [TaskVector("a", Path("a"), factors={"head": Factors(torch.randn(2, 6), torch.randn(5, 2))})]
    inputs = [Inputs("t", {"x": torch.randn(8, 6)})]

    def merged(steps, folder=None):
        adaptive = AdaptiveSettings(steps=steps, save_steps=1, learning_rate=0.05)
        return merge(model, adapters, MergeSettings("adamerging_task", adaptive=adaptive), inputs, folder)

    expected, _ = merged(4), merged(2, str(tmp_path))
    resumed = merged(4, str(tmp_path))
    assert resumed.losses == expected.losses and torch.equal(resumed.coefficients, expected.coefficients)
    assert len(list((tmp_path / "coefficients").iterdir())) == 1
