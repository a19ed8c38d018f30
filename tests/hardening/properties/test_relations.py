"""Relations between calls that hold whatever the formula's numbers are: see `relations` for how they are judged."""

import torch
from hypothesis import strategies as st

from tests.hardening.properties.formula import balls
from tests.hardening.properties.profile import cases
from tests.hardening.properties.recipes import call
from tests.hardening.properties.relations import ROUTING, Other, hold, related, tensors_of

EVERYWHERE = ("y", "logits", "dx", "dweight", "dbias", "dshared_a", "dexpert_b", "drouter_weight")


def present(results, names):
    return [name for name in names if name in results]


def summed(results, names):
    return {name: sum(r[name] for r in results if name in r) for name in names if any(name in r for r in results)}


def joined(results, names, dim=0):
    return {name: torch.cat([r[name] for r in results], dim) for name in present(results[0], names)}


@cases(60, case=related().filter(lambda case: case[1]))
def test_where_nothing_is_rounded_every_number_is_the_formulas(case):
    recipe, _ = case
    inputs, results, dout, dlogits = call(recipe, tensors_of(recipe, whole=True))
    expected = balls(inputs, recipe.settings(), results["logits"], dout, dlogits)
    for name, value in results.items():
        assert torch.equal(value, expected[name].mid), name


@cases(40, case=related(), factor=st.sampled_from((2, 3)))
def test_scaling_alpha_scales_the_update_and_its_gradients(case, factor):
    """And adds to a base that it leaves alone."""
    recipe, whole = case
    tensors = tensors_of(recipe, whole)
    larger = recipe._replace(scale=recipe.scale * factor)

    def combine(base, update):
        scaled = {n: factor * t for n, t in update.items()}
        return summed([base, scaled], ("y", "dx", "dshared_a", "dexpert_b", "drouter_weight")) | {
            n: base[n] for n in present(base, ("logits", "dweight", "dbias"))
        }

    update = recipe.update_only()
    hold(larger, tensors, whole, [Other(recipe, tensors, {"scale": 0.0}), Other(update, tensors)], combine)


@cases(40, case=related(), factor=st.sampled_from((2, 3)))
def test_the_update_is_linear_in_b_and_b_has_its_gradient_from_elsewhere(case, factor):
    recipe, whole = case
    recipe = recipe.update_only()
    tensors = tensors_of(recipe, whole)
    larger = tensors | {"expert_b": tensors["expert_b"] * factor}

    def combine(update):
        return {n: factor * update[n] for n in ("y", "dx", "dshared_a", "drouter_weight")} | {
            n: update[n] for n in ("logits", "dexpert_b")
        }

    hold(recipe, larger, whole, [Other(recipe, tensors)], combine)


@cases(40, case=related(), data=st.data())
def test_permuting_experts_with_their_router_rows_permutes_their_gradients(case, data):
    recipe, whole = case
    shape = recipe.shape
    if shape.mixing == "diagonal":  # the mask knows an expert by its place
        recipe = recipe._replace(dropout_p=0.0)
    order = torch.tensor(data.draw(st.permutations(range(shape.E))))
    tensors = tensors_of(recipe, whole)
    columns = (order.unsqueeze(1) * shape.R + torch.arange(shape.R)).flatten()
    rows = columns if shape.mixing == "diagonal" else torch.arange(shape.R)
    places = {"expert_b": (1, columns), "shared_a": (0, rows), "router_weight": (0, order), "dlogits": (1, order)}
    permuted = tensors | {n: tensors[n].index_select(dim, index) for n, (dim, index) in places.items()}

    def combine(plain):
        moved = {f"d{n}": plain[f"d{n}"].index_select(*places[n]) for n in ("expert_b", "shared_a", "router_weight")}
        moved["logits"] = plain["logits"].index_select(1, order)
        return {n: moved.get(n, plain[n]) for n in present(plain, EVERYWHERE)}

    hold(recipe, permuted, whole, [Other(recipe, tensors)], combine)


@cases(40, case=related(), data=st.data())
def test_permuting_tokens_permutes_what_is_of_tokens(case, data):
    recipe, whole = case
    order = torch.tensor(data.draw(st.permutations(range(recipe.shape.T))), dtype=torch.int64)
    tensors = tensors_of(recipe, whole)
    permuted = tensors | {n: tensors[n].index_select(0, order) for n in ("x", "dout", "dlogits")}

    def combine(plain):
        return {n: t.index_select(0, order) if n in ("y", "logits", "dx") else t for n, t in plain.items()}

    hold(recipe, permuted, whole, [Other(recipe, tensors)], combine)


@cases(40, case=related(), data=st.data())
def test_a_batch_is_its_parts(case, data):
    """Nobody's output depends on who else is in the batch, and gradients of weights are the sums of the parts'."""
    recipe, whole = case
    tokens = recipe.shape.T
    cuts = sorted(data.draw(st.sets(st.integers(0, tokens), max_size=3)))
    bounds = list(zip([0, *cuts], [*cuts, tokens], strict=True))
    tensors, others = tensors_of(recipe, whole), []
    for start, stop in bounds:
        part = recipe._replace(shape=recipe.shape._replace(T=stop - start), leading=(stop - start,))
        others.append(Other(part, tensors | {n: tensors[n][start:stop] for n in ("x", "dout", "dlogits")}))

    def combine(*parts):
        own = joined(parts, ("y", "logits", "dx"))
        return own | summed(parts, [n for n in EVERYWHERE if n not in own])

    hold(recipe, tensors, whole, others, combine)


@cases(40, case=related(), data=st.data())
def test_output_features_may_be_split_over_two_layers(case, data):
    recipe, whole = case
    width = recipe.shape.D_out
    if width == 1:
        return
    cut = data.draw(st.integers(1, width - 1))
    tensors, others = tensors_of(recipe, whole), []
    for start, stop in ((0, cut), (cut, width)):
        part = recipe._replace(
            shape=recipe.shape._replace(D_out=stop - start), incoming=recipe.incoming[: 2 - (start > 0)]
        )
        own = {n: tensors[n][start:stop] for n in ("weight", "bias", "expert_b")}
        others.append(Other(part, tensors | own | {"dout": tensors["dout"][:, start:stop]}))

    def combine(*parts):
        return (
            joined(parts, ("y",), dim=1)
            | joined(parts, ("dweight", "dbias", "dexpert_b"))
            | summed(parts, ("dx", "dshared_a", "drouter_weight"))
            | {"logits": parts[0]["logits"]}
        )

    hold(recipe, tensors, whole, others, combine)


@cases(40, case=related(), data=st.data())
def test_an_experts_b_of_zeros_takes_away_what_it_alone_would_add(case, data):
    recipe, whole = case
    shape = recipe.shape
    expert = data.draw(st.integers(0, shape.E - 1))
    own = torch.zeros(shape.E * shape.R, dtype=torch.bool)
    own[expert * shape.R : (expert + 1) * shape.R] = True
    tensors = tensors_of(recipe, whole)
    b = tensors["expert_b"]
    # With B's strides: products of another layout may be rounded otherwise.
    alone, rest = (tensors | {"expert_b": torch.empty_strided(b.shape, b.stride(), dtype=b.dtype)} for _ in range(2))
    alone["expert_b"].copy_(torch.where(own, b, 0.0))
    rest["expert_b"].copy_(torch.where(own, 0.0, b))
    update = recipe.update_only()

    def combine(rest, alone):
        added = summed([rest, alone], ("y", "dx", "dshared_a", "drouter_weight"))
        return added | {n: rest[n] for n in present(rest, ("logits", "dweight", "dbias", "dexpert_b"))}

    mine, (without_it, only_it) = hold(recipe, tensors, whole, [Other(recipe, rest), Other(update, alone)], combine)
    # What does not depend on B, and who did not choose the expert, keeps its bits.
    assert torch.equal(without_it["dexpert_b"], mine["dexpert_b"])
    assert torch.equal(without_it["logits"], mine["logits"])
    chosen = mine["logits"].sort(dim=1, descending=True, stable=True).indices[:, : shape.K]
    passed_by = (chosen != expert).all(1)
    assert torch.equal(without_it["y"][passed_by], mine["y"][passed_by])
    assert not only_it["y"][passed_by].any()


@cases(40, case=related())
def test_two_of_every_expert_and_twice_as_many_chosen_change_nothing(case):
    """The twins share their gate, and together they get their expert's gradients."""
    recipe, whole = case
    shape = recipe.shape
    diagonal = shape.mixing == "diagonal"
    if diagonal:
        recipe = recipe._replace(dropout_p=0.0)
    twice = recipe._replace(shape=shape._replace(E=2 * shape.E, K=2 * shape.K))
    tensors = tensors_of(recipe, whole)
    d_logits = tensors["dlogits"]

    def doubled(tensor, dim, size):
        return tensor.unflatten(dim, (shape.E, size)).repeat_interleave(2, dim).flatten(dim, dim + 1)

    twins = tensors | {
        "expert_b": doubled(tensors["expert_b"], 1, shape.R),
        "shared_a": doubled(tensors["shared_a"], 0, shape.R) if diagonal else tensors["shared_a"],
        "router_weight": tensors["router_weight"].repeat_interleave(2, 0),
        "dlogits": torch.stack((d_logits, torch.zeros_like(d_logits)), 2).flatten(1),
    }

    def halves(tensor, dim, size):
        return tensor.unflatten(dim, (shape.E, 2, size)).sum(dim + 1).flatten(dim, dim + 1)

    def combine(of_twins):
        merged = {
            "logits": of_twins["logits"][:, ::2],
            "dexpert_b": halves(of_twins["dexpert_b"], 1, shape.R),
            "drouter_weight": halves(of_twins["drouter_weight"], 0, 1),
        }
        if diagonal:
            merged["dshared_a"] = halves(of_twins["dshared_a"], 0, shape.R)
        return {n: merged.get(n, of_twins[n]) for n in present(of_twins, EVERYWHERE)}

    hold(recipe, tensors, whole, [Other(twice, twins)], combine)


@cases(40, case=related(), more=st.integers(1, 3))
def test_experts_that_nobody_chooses_change_nothing_and_get_nothing(case, more):
    recipe, whole = case
    shape = recipe.shape
    wider = recipe._replace(shape=shape._replace(E=shape.E + more))
    tensors = tensors_of(recipe, whole)
    low = tensors["router_weight"].new_zeros(more, shape.D_in)
    low[:, 0] = -8 * ROUTING  # x is one there
    added = wider.tensors()  # any numbers
    columns, rows = shape.E * shape.R, more * shape.R if shape.mixing == "diagonal" else 0
    crowded = tensors | {
        "expert_b": torch.cat((tensors["expert_b"], added["expert_b"][:, columns:]), 1),
        "shared_a": torch.cat((tensors["shared_a"], added["shared_a"][:rows])),
        "router_weight": torch.cat((tensors["router_weight"], low)),
        "dlogits": torch.cat((tensors["dlogits"], tensors["dlogits"].new_zeros(shape.T, more)), 1),
    }

    def combine(crowd):
        own = {
            "logits": crowd["logits"][:, : shape.E],
            "dexpert_b": crowd["dexpert_b"][:, :columns],
            "drouter_weight": crowd["drouter_weight"][: shape.E],
            "dshared_a": crowd["dshared_a"][: shape.rows],
        }
        return {n: own.get(n, crowd[n]) for n in present(crowd, EVERYWHERE)}

    _, (crowd,) = hold(recipe, tensors, whole, [Other(wider, crowded)], combine)
    assert not crowd["dexpert_b"][:, columns:].any() and not crowd["drouter_weight"][shape.E :].any()
    assert not crowd["dshared_a"][shape.rows :].any()


@cases(40, case=related(dtypes=(torch.float64, torch.float32)), shift=st.integers(-8, 8))
def test_gates_know_only_differences_of_logits(case, shift):
    """The same vector more in every router row: dx does not change either, since the gates' gradients sum to zero."""
    recipe, whole = case
    recipe = recipe._replace(incoming=("dout",))
    tensors = tensors_of(recipe, whole)
    shifted = tensors | {"router_weight": tensors["router_weight"] + shift}

    def combine(plain):
        return {n: t for n, t in plain.items() if n != "logits"}

    hold(recipe, shifted, whole, [Other(recipe, tensors)], combine)


@cases(40, case=related(dropout=(0.0, 0.0)))
def test_equal_as_for_all_experts_are_one_that_they_share(case):
    recipe, whole = case
    shape = recipe.shape._replace(mixing="expand")
    recipe = recipe._replace(shape=shape)
    own = recipe._replace(shape=shape._replace(mixing="diagonal"))
    tensors = tensors_of(recipe, whole)
    repeated = tensors | {"shared_a": tensors["shared_a"].repeat(shape.E, 1)}

    def combine(each):
        return each | {"dshared_a": each["dshared_a"].unflatten(0, (shape.E, shape.R)).sum(0)}

    hold(recipe, tensors, whole, [Other(own, repeated)], combine)


@cases(40, case=related())
def test_gradients_of_both_outputs_are_the_sum_of_each_ones(case):
    recipe, whole = case
    tensors = tensors_of(recipe, whole)
    others = [Other(recipe._replace(incoming=(n,)), tensors) for n in recipe.incoming]

    def combine(*each):
        return summed(each, [n for n in EVERYWHERE if n[0] == "d"])

    _, (_, of_logits) = hold(recipe, tensors, whole, others, combine)
    assert not of_logits["dexpert_b"].any() and not of_logits["dshared_a"].any()
