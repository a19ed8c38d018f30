"""Task vectors are what their folders add to the base, and merging several is one mixture with constant gates."""

import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from mosld import MoSLDConfig, export_lora
from mosld.merging import MergeSettings, applied, merge, save_checkpoint, save_lora
from mosld.merging.channel import received, sent_powers
from mosld.merging.elementwise import disjoint_mean, summed, thresholds, ties
from mosld.merging.factored import FactoredMerge, shared_basis, stacked
from mosld.merging.read import read_task_vectors
from mosld.merging.unlabelled import entropy
from mosld.merging.vectors import Factors, MergeError, deltas
from tests.helpers.models import perturb, tiny_llama, token_ids

IDS = token_ids()
RANKS = {"a": 2, "b": 5}
TARGETS = {"a": ["q_proj", "down_proj"], "b": ["q_proj", "up_proj"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two trained LoRAs of other ranks and targets on one base."""
    folder = tmp_path_factory.mktemp("adapters")
    for number, name in enumerate(RANKS):
        config = peft.LoraConfig(r=RANKS[name], lora_alpha=3, target_modules=TARGETS[name])
        model = peft.get_peft_model(tiny_llama(), config)
        torch.manual_seed(number)
        perturb(model)
        model.save_pretrained(str(folder / name))
    return [folder / name for name in RANKS]


def merged_by_peft(folder):
    return peft.PeftModel.from_pretrained(tiny_llama(), str(folder)).merge_and_unload().state_dict()


def test_a_vector_is_the_difference_that_peft_makes_by_merging(folders):
    base = tiny_llama().state_dict()
    vectors = read_task_vectors(folders)
    tuned = [merged_by_peft(folder) for folder in folders]
    seen = set()
    for name, taus in deltas(vectors, base):
        seen.add(name)
        for tau, own in zip(taus, tuned, strict=True):
            torch.testing.assert_close(tau, own[name] - base[name], rtol=1e-4, atol=1e-6)
    assert seen == {name for own in tuned for name in base if not torch.equal(own[name], base[name])}


@pytest.mark.parametrize("use_rslora", [False, True])
def test_ranks_and_alphas_of_their_own_and_rslora_have_pefts_scales(tmp_path, use_rslora):
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["q_proj", "up_proj"], use_rslora=use_rslora, rank_pattern={"up_proj": 5},
        alpha_pattern={"layers.1.self_attn.q_proj": 7},
    )  # fmt: skip
    model = peft.get_peft_model(tiny_llama(), config)
    perturb(model)
    model.save_pretrained(str(tmp_path))
    base, tuned = tiny_llama().state_dict(), merged_by_peft(tmp_path)
    vectors = dict(deltas(read_task_vectors([tmp_path]), base))
    assert len(vectors) == 4
    for name, (tau,) in vectors.items():
        torch.testing.assert_close(tau, tuned[name] - base[name], rtol=1e-4, atol=1e-6)


def test_a_full_checkpoint_has_the_same_vector_as_its_adapter(folders, tmp_path):
    model = peft.PeftModel.from_pretrained(tiny_llama(), str(folders[0])).merge_and_unload()
    model.save_pretrained(tmp_path / "full")
    base = tiny_llama().state_dict()
    whole, factored = (dict(deltas(read_task_vectors([f]), base)) for f in (tmp_path / "full", folders[0]))
    for name, tau in factored.items():
        torch.testing.assert_close(whole[name], tau, rtol=1e-4, atol=1e-6)


def test_a_mosld_adapter_has_the_vector_of_its_uniform_export(tmp_path):
    config = MoSLDConfig(r=3, num_experts=4, target_modules=["q_proj"], num_experts_pattern={r".*layers\.1\..*": 2})
    model = peft.get_peft_model(tiny_llama(), config)
    perturb(model)
    model.save_pretrained(str(tmp_path / "mixture"))
    export_lora(model, tmp_path / "lora")
    base = tiny_llama().state_dict()
    own, exported = (dict(deltas(read_task_vectors([tmp_path / n]), base)) for n in ("mixture", "lora"))
    assert own.keys() == exported.keys() and len(own) == 2
    for name in own:
        torch.testing.assert_close(own[name], exported[name], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_task_arithmetic_of_loras_equals_the_dense_computation_and_leaves_as_one_lora(folders, tmp_path):
    coefficients = [0.3, 0.7]
    model = stacked(tiny_llama(), read_task_vectors(folders)).eval()
    dense = tiny_llama()
    for name, update in summed(lambda: deltas(read_task_vectors(folders), tiny_llama().state_dict()), coefficients):
        dense.get_parameter(name).add_(update)
    for module in model.modules():
        if hasattr(module, "mixtures"):
            module.mixtures["default"].router.weight.copy_(torch.tensor([coefficients]))
    expected = dense.eval()(IDS).logits
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    export_lora(model, tmp_path / "lora")
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "lora")).eval()
    torch.testing.assert_close(loaded(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert (tiny_llama()(IDS).logits - expected).abs().max() > 1e-2


def test_layer_wise_coefficients_get_gradients(folders):
    model = stacked(tiny_llama(), read_task_vectors(folders))
    model(IDS).logits.square().sum().backward()
    trained = {n: p for n, p in model.named_parameters() if "mosld_router" in n}
    assert len(trained) == 6 and all(p.shape == (1, 2) for p in trained.values())
    for name, parameter in trained.items():  # a vector that has none of a layer has no say in it
        places = [any(t in name for t in TARGETS[task]) for task in RANKS]
        assert (parameter.grad[0] != 0).tolist() == places, name


@torch.no_grad()
def test_layer_wise_coefficients_run_in_the_layers_that_they_are_written_to(folders):
    own = FactoredMerge(tiny_llama(), read_task_vectors(folders))
    coefficients = torch.rand(len(own.layers), 2, generator=torch.Generator().manual_seed(1))
    running = own(coefficients)(input_ids=IDS)
    own.write(coefficients)
    torch.testing.assert_close(own.model(IDS).logits, running)
    own.write(coefficients.flip(0))
    assert (own.model(IDS).logits - running).abs().max() > 1e-3


def test_permuting_the_adapters_changes_nothing(folders):
    base = tiny_llama().state_dict()
    for merged in (
        lambda order: dict(summed(lambda: deltas(read_task_vectors(order), base), 0.4)),
        lambda order: {n: disjoint_mean(p) for n, p in ties(lambda: deltas(read_task_vectors(order), base), 0.3)},
    ):
        one, other = merged(folders), merged(folders[::-1])
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(one[name], other[name])


@pytest.mark.parametrize("keep", [0.01, 0.2, 0.5, 1.0])
def test_the_threshold_is_that_of_sorting_the_whole_vector(keep):
    torch.manual_seed(0)
    weights = {"a": torch.randn(3, 7, 11), "b": torch.randn(3, 50) * 1e-3}
    weights["b"][:, :20] = 0
    limits = thresholds(weights.items, keep)
    for k in range(3):
        whole = torch.cat([tau[k].flatten() for tau in weights.values()]).abs()
        expected = whole.sort(descending=True).values[max(1, round(len(whole) * keep)) - 1]
        assert limits[k] == expected


def test_ties_is_what_its_three_steps_say():
    taus = torch.tensor([[4.0, -3.0, 0.1, 2.0], [-1.0, -2.0, 5.0, 0.2]])
    ((name, parts),) = ties(lambda: [("w", taus)], 0.75)
    # Trimmed to three each: 4, -3, 2 and -1, -2, 5; the elected signs are those of the sums 3, -5, 5, 2, so -1 goes.
    assert name == "w" and parts.tolist() == [[4, -3, 0, 2], [0, -2, 5, 0]]
    assert disjoint_mean(parts).tolist() == [4, -2.5, 5, 2]


def test_a_merge_by_ties_adds_the_mean_of_what_agrees(folders):
    """Element by element, over the vectors that have a say there, times the scale."""
    base, vectors = tiny_llama(), read_task_vectors(folders)
    updates = dict(merge(base, vectors, MergeSettings("ties", scale=0.7, keep=0.5)).updates(base))
    trimmed = dict(ties(lambda: deltas(vectors, base.state_dict()), 0.5))
    assert updates.keys() == trimmed.keys()
    shared = 0
    for name, parts in trimmed.items():
        count = (parts != 0).sum(0)
        shared += int((count > 1).sum())
        torch.testing.assert_close(updates[name], 0.7 * parts.sum(0) / count.clamp(min=1))
    assert shared  # where one alone has a say, the mean is the sum


def test_a_shared_basis_of_full_rank_loses_nothing_and_of_less_what_the_best_loses():
    torch.manual_seed(0)
    factors = [Factors(torch.randn(2, 9), torch.randn(6, 2)) for _ in range(3)]
    updates = torch.cat([own.up.double() @ own.down.double() for own in factors])
    for rank in (6, 4, 2):
        shared, ups, error = shared_basis(factors, rank)
        rebuilt = torch.cat([up @ shared for up in ups])
        assert ((rebuilt - updates).norm() / updates.norm()).item() == pytest.approx(error, abs=1e-9)
        singular = torch.linalg.svdvals(updates)
        best = (singular[rank:].square().sum() / singular.square().sum()).sqrt().item()
        assert error == pytest.approx(best, abs=1e-9)


def test_entropy_has_the_gradient_of_finite_differences():
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(entropy, logits)
    assert entropy(torch.zeros(4)) == pytest.approx(torch.tensor(4.0).log().item())


@pytest.mark.parametrize("noise", ["isotropic", "worst"])
def test_the_noise_has_the_power_that_was_asked_for(noise):
    torch.manual_seed(0)
    weights = {"a": torch.randn(2, 40, 30), "b": torch.randn(2, 50)}
    weights["a"][1] *= 2
    generator, ratios, kept = torch.Generator().manual_seed(1), [], []
    own, _ = sent_powers(weights.items)
    for _ in range(400):
        arrived = dict(received(weights.items, noise, 10.0, generator))
        noises = {n: arrived[n] - weights[n] for n in weights}
        ratios.append(sent_powers(noises.items)[0] / own)
        kept.append(noises)
    mean = torch.stack(ratios).mean(0)
    # The mean of 400 squares: of one normal number each along a direction (7 % off by itself), of 1250 elsewhere.
    torch.testing.assert_close(mean, torch.full((2,), 0.1).double(), rtol=0.25 if noise == "worst" else 0.01, atol=0.0)
    flat = torch.stack([torch.cat([n[0].flatten() for n in noises.values()]) for noises in kept])
    along = torch.cat([w[1].flatten() for w in weights.values()])  # the strongest user's
    share = ((flat @ along) / along.norm() / flat.norm(dim=1)).square().mean()
    assert share == pytest.approx(1.0, abs=1e-4) if noise == "worst" else share < 0.01
    again, first = (dict(received(weights.items, noise, 10.0, torch.Generator().manual_seed(1))) for _ in range(2))
    assert all(torch.equal(again[n], first[n]) for n in weights)
    assert all(torch.equal(t, weights[n]) for n, t in received(weights.items, "ideal", 0.0, torch.Generator()))


def test_what_cannot_be_merged_is_named(folders, tmp_path):
    with pytest.raises(MergeError, match="needs at least one adapter or checkpoint"):
        read_task_vectors([])
    with pytest.raises(MergeError, match="is no adapter and no checkpoint"):
        read_task_vectors([tmp_path])
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_bytes((folders[0] / "adapter_config.json").read_bytes())
    tensors = load_file(folders[0] / "adapter_model.safetensors")
    name = next(name for name in tensors if "layers.1" in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, broken / "adapter_model.safetensors")
    with pytest.raises(MergeError, match=r"broken holds values that are not finite in model\.layers\.1"):
        read_task_vectors([broken])
    with pytest.raises(MergeError, match="changes model.layers.0.* which the base model has not"):
        list(deltas(read_task_vectors(folders), {}))


def tied():
    """A model whose output layer shares the embeddings' weight."""
    model = tiny_llama(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


def saved_as(folder, model, *names):
    """A checkpoint that knows the tied weight by `names`, as different libraries write it."""
    folder.mkdir()
    shared = model.lm_head.weight.detach()
    others = {n: t.detach() for n, t in model.named_parameters() if n != "model.embed_tokens.weight"}
    save_file({**others, **{name: shared.clone() for name in names}}, folder / "model.safetensors")
    return folder


@torch.no_grad()
def test_a_tied_weight_is_the_same_one_under_each_of_its_names(tmp_path):
    updates, folders = [], []
    for k, names in enumerate(
        (["lm_head.weight"], ["model.embed_tokens.weight"], ["lm_head.weight", "model.embed_tokens.weight"])
    ):
        model = tied()
        torch.manual_seed(k)
        updates.append(torch.randn_like(model.lm_head.weight))
        model.lm_head.weight.add_(updates[-1])
        folders.append(saved_as(tmp_path / str(k), model, *names))
    base = tied()
    merged = merge(base, read_task_vectors(folders), MergeSettings("task_arithmetic", scale=0.5))
    found = {name: update for name, update in merged.updates(base) if update.any()}
    assert list(found) == ["model.embed_tokens.weight"]  # once, and by the name that the model's parameters have
    torch.testing.assert_close(found["model.embed_tokens.weight"], 0.5 * sum(updates), rtol=1e-5, atol=1e-6)
    with applied(base, merged) as model:
        torch.testing.assert_close(
            model.lm_head.weight, tied().lm_head.weight + 0.5 * sum(updates), rtol=1e-5, atol=1e-6
        )
    assert torch.equal(base.lm_head.weight, tied().lm_head.weight)


def test_an_adapter_on_a_tied_layer_is_merged_factored_and_not_into_the_embeddings(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"], ensure_weight_tying=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of the tied weight, which is what is tested
        model = peft.get_peft_model(tied(), config)
        perturb(model)
        model.save_pretrained(str(tmp_path / "a"))
    base, vectors = tied(), read_task_vectors([tmp_path / "a"])
    with pytest.raises(MergeError, match="a adapts lm_head, whose weight is also model.embed_tokens.weight"):
        merge(base, vectors, MergeSettings("ties"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = merge(base, vectors, MergeSettings("task_arithmetic", scale=1.0))
        with pytest.raises(MergeError, match="a adapts lm_head"):
            save_checkpoint(base, merged, tmp_path / "whole")
        assert save_lora(base, merged, tmp_path / "lora") < 1e-6
        with torch.no_grad(), applied(base, merged) as both:
            torch.testing.assert_close(both(IDS).logits, model.eval()(IDS).logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(base.lm_head.weight, tied().lm_head.weight)
