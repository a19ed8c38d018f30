"""`mosld inspect --config ... --model NAME`: counts are the papers' and our formulas', cost is that of a real layer."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from mosld import presets, set_routing
from mosld.analysis import known_models
from mosld.analysis.cost import adapted, cost_per_token, count
from mosld.cli.inspect_text import cost_text
from mosld.cli.main import main
from mosld.tuner.layer import MoSLDPeftLinear
from tests.helpers.models import tiny_llama

DEMO = Path(__file__).parent.parent.parent / "docs/results/demo/block.json"
FEED_FORWARD = "gate_proj,up_proj,down_proj"


def one(model: str, config: str, targets: str | None = None) -> dict:
    return count(model, [config], targets)["methods"][0]


# Figures verified against the papers' own tables, or computed by hand from their formulas, of LLaMA-2-7B.
@pytest.mark.parametrize(
    ("config", "targets", "trained"),
    [
        ("lora", "q_proj,v_proj", 4_194_304),
        ("mosld:num_experts=8/6/4/2", "q_proj,v_proj", 13_893_632),
        ("mosl:num_experts=2/4/6/8", "q_proj,v_proj", 13_893_632),
        ("mola:num_experts=2/4/6/8", "q_proj,v_proj", 22_282_240),
        ("mola", "q_proj,v_proj", 35_651_584),
        ("malora:r=8,r_up=12", "q_proj,v_proj", 29_409_280),
        ("mode:r=4,num_experts=6", "q_proj,v_proj", 13_631_488),
        ("mtl_lora:num_experts=3,num_tasks=8", "q_proj,k_proj,v_proj,o_proj", 16_845_824),
        ("mor1e:r=4,r_up=8", "all-linear", 51_872_192),
        ("loramoe:r=4,num_experts=8", FEED_FORWARD, 51_314_688),
        ("mosld:num_experts=8/6/4/2", "all-linear", 69_197_824),
        ("mola:num_experts=2/4/6/8", "all-linear", 105_635_840),
    ],
)
def test_counts_on_llama_2_7b_are_the_verified_figures(config, targets, trained):
    assert one("llama-2-7b", config, targets)["trained"] == trained


@pytest.mark.parametrize(("experts", "without_router"), [(3, 8_388_608), (10, 23_068_672)])
def test_hydralora_without_its_router_is_what_its_paper_counts(experts, without_router):
    report = count("llama-2-7b", [f"hydralora:r=8,num_experts={experts}"], "q_proj,v_proj")
    method = report["methods"][0]
    assert method["parts"]["shared_a"] + method["parts"]["expert_b"] == without_router
    assert method["parts"]["router"] == 64 * experts * 4096
    # of base and adapter, as the paper counts: it prints 0.124 % and 0.341 %
    share = 100 * without_router / (report["parameters"] + without_router)
    assert share == pytest.approx({3: 0.124, 10: 0.341}[experts], abs=6e-4)


# Parameters of one layer, written out by the papers' formulas: d in, o out, of each preset as it stands.
FORMULAS = {
    "lora": lambda d, o: 8 * d + 8 * o,
    "mosld": lambda d, o: 8 * d + 8 * 8 * o + 8 * d,
    "mosl": lambda d, o: 8 * d + 8 * 8 * o + 8 * d,
    "mosld_up": lambda d, o: 8 * 8 * d + 8 * o + 8 * d,
    "hydralora": lambda d, o: 8 * d + 3 * 8 * o + 3 * d,
    "mola": lambda d, o: 8 * 8 * (d + o) + 8 * d,
    "loramoe": lambda d, o: 8 * 4 * (d + o) + 8 * d,
    "moelora": lambda d, o: 8 * 8 * (d + o) + 8 * d,
    "moelora_medical": lambda d, o: 8 * (d + o) + 8 * 64 + 8 * 64,  # embeddings of 8 tasks, a linear layer on them
    "malora": lambda d, o: 8 * d + 8 * (12 * 8 + 12 * o) + 8 * d,
    "mtl_lora": lambda d, o: 8 * d + 8 * 8 * 8 + 3 * 8 * o + 8 * 3,
    "mode": lambda d, o: 4 * d + 6 * 4 * o + 4 * 6 * d,
    "mor1e": lambda d, o: 4 * d + 8 * o + 32 * d + 2,
    "mixlora_conditional": lambda d, o: 16 * (d + o) + 2 * 16 * d + 4 * d * 16,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_counts_of_layers_are_the_formulas_and_the_mixtures_own(name):
    method = one("llama-3-8b", name, "k_proj,up_proj,down_proj")
    sizes = {"k_proj": (4096, 1024), "up_proj": (4096, 14336), "down_proj": (14336, 4096)}
    mixture = presets.preset(name).mixture_of("any")
    for kind in method["kinds"]:
        d, o = sizes[kind["name"]]
        assert (kind["in_features"], kind["out_features"], kind["layers"]) == (d, o, 32)
        assert kind["trained"] == sum(kind["parts"].values()) == FORMULAS[name](d, o) == mixture.parameters(d, o)
    assert method["layers"] == 96 and len(method["kinds"]) == 3
    assert method["trained"] == 32 * sum(FORMULAS[name](*size) for size in sizes.values())


def test_every_preset_trains_what_is_counted(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    report = count(str(tmp_path))
    assert [method["config"] for method in report["methods"]] == list(presets.PRESETS)
    base = sum(p.numel() for p in tiny_llama().parameters())
    assert report["parameters"] == base
    for method in report["methods"]:
        model = get_peft_model(tiny_llama(), presets.preset(method["config"]))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert method["trained"] == trained == sum(method["parts"].values())
        assert method["share"] == trained / base


def test_the_embedded_model_has_the_sizes_of_the_committed_run():
    methods = json.loads(DEMO.read_text())["methods"]
    for name in ("lora", "mosld"):
        assert one("embedded", name, "all-linear")["trained"] == methods[name]["trainable_parameters"]


# As published: hub pages, the models' reports.
PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "mistral-7b": 7_241_732_096,
    "gemma-2b": 2_506_172_416,
    "gpt2": 124_439_808,
    "bert-base": 109_482_240,
    "t5-base": 222_903_552,
    "vit-base": 86_389_248,
}


@pytest.mark.parametrize("name", known_models.KNOWN)
def test_known_models_have_their_published_sizes(name):
    assert sum(p.numel() for p in known_models.build(name).parameters()) == PUBLISHED[name]


class Allocated(TorchDispatchMode):
    """Bytes of all tensors that any operation returns and that have memory."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self.total += tensor.numel() * tensor.element_size()
        return out


def test_nothing_of_seven_billion_parameters_is_allocated():
    model = adapted(known_models.build("llama-2-7b"), presets.mola(dropout=0.1))
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"meta"}
    with Allocated() as watch:
        torch.ones(3)
        assert watch.total == 12  # it sees what has memory
        count("llama-2-7b", ["mola:dropout=0.1", "mor1e"])
    assert watch.total < 1000


def mask_bits(d):
    return d / 8  # dropout on x: one bit an element


# Of one layer d -> o: the adapter's multiplications per token, and bytes kept for backward beside x in bfloat16.
COSTS = {
    "lora": (lambda d, o: 8 * d + 8 * o, lambda d: 2 * 8),
    "mosld": (lambda d, o: 8 * d + 64 * o + 8 * d, lambda d: 2 * 8 + 4 * 8),  # z and, in float32, the gates
    "hydralora": (lambda d, o: 8 * d + 24 * o + 3 * d, lambda d: mask_bits(d) + 2 * 24 + 4 * 8 + 4 * 3),
    "mode": (lambda d, o: 4 * d + 24 * o + 24 * d, lambda d: 2 * 24 + 4 * 4 + 4 * 24),
    "malora": (lambda d, o: 8 * d + 96 * 8 + 96 * o + 8 * d, None),
    "mtl_lora": (lambda d, o: 8 * d + 8 * 8 + 24 * o, None),
    "moelora_medical": (lambda d, o: 8 * d + 8 * o, None),  # routing falls once a sequence
}


def adapted_linear(mixture, d, o, device) -> MoSLDPeftLinear:
    with torch.device(device):
        layer = MoSLDPeftLinear(torch.nn.Linear(d, o, dtype=torch.bfloat16).requires_grad_(False))
        layer.update_layer("default", inference_mode=False, **vars(mixture))
    return layer.train()


@pytest.mark.parametrize("name", COSTS)
def test_cost_per_token_is_that_of_the_formulas(name):
    d, o = 512, 384
    mixture = presets.preset(name).mixture_of("any")
    multiplications, frozen, saved = cost_per_token(adapted_linear(mixture, d, o, "meta"))
    of_products, of_memory = COSTS[name]
    assert (multiplications, frozen) == (of_products(d, o), d * o)
    assert of_memory is None or saved == of_memory(d)


@pytest.mark.parametrize("name", FORMULAS)
def test_what_is_kept_for_backward_is_what_a_layer_with_numbers_keeps(name):
    d, o = 64, 48
    mixture = presets.preset(name).mixture_of("any")
    *_, told = cost_per_token(adapted_linear(mixture, d, o, "meta"))
    real, kept = adapted_linear(mixture, d, o, "cpu"), {}
    set_routing(real, task_ids=0)
    for length in (32, 96):
        x = torch.randn(1, length, d, dtype=torch.bfloat16, requires_grad=True)
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.update({t.untyped_storage().data_ptr(): t}) or t, lambda t: t
        ):
            real(x)
        saved.pop(x.untyped_storage().data_ptr(), None)
        kept[length] = sum(t.untyped_storage().nbytes() for t in saved.values())
    assert told == (kept[96] - kept[32]) / 64


def test_the_whole_models_cost_is_the_sum_over_its_layers():
    method = one("llama-3-8b", "mosld:num_experts=8/4", "q_proj,k_proj,down_proj")
    sizes = [(4096, 4096), (4096, 1024), (14336, 4096)]
    ours = sum(16 * (8 * d + e * 8 * o + e * d) for d, o in sizes for e in (8, 4))
    assert method["multiplications"] == ours / sum(32 * d * o for d, o in sizes)
    assert method["saved_bytes"] == sum(16 * 3 * (16 + 4 * e) for e in (8, 4))
    assert method["experts"] == [4, 8] and method["layers"] == 96 and len(method["kinds"]) == 6


def test_modules_saved_beside_the_adapter_are_counted_apart(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    method = one(str(tmp_path), 'mosld:modules_to_save=["lm_head"]')
    assert method["parts"]["others"] == 96 * 32
    assert method["trained"] == 96 * 32 + sum(kind["layers"] * kind["trained"] for kind in method["kinds"])


def test_a_saved_adapter_counts_as_one_to_be_trained(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    config = presets.mosld(r=2, num_experts=3, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), config)
    model.save_pretrained(str(tmp_path / "adapter"))
    method = one(str(tmp_path / "model"), str(tmp_path / "adapter"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert method["trained"] == trained == 2 * (2 * 32 + 6 * 32 + 3 * 32)


def test_gates_from_the_caller_cost_no_router(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    method = one(str(tmp_path), "mosld:router=external,dropout=0,balance_coef=0")
    assert "router" not in method["parts"]
    assert method["multiplications"] == pytest.approx(sum(8 * 32 + 64 * o for o in (32, 16)) / (32 * 32 + 32 * 16))


def test_measuring_leaves_what_was_set_for_the_next_forward():
    layer = adapted_linear(presets.mosld().mixture_of("any"), 8, 8, "meta")
    set_routing(layer, task_ids=3)
    given = layer.mixtures["default"].routing
    cost_per_token(layer)
    assert layer.mixtures["default"].routing is given


def test_the_command_prints_tables_and_json(tmp_path, capsys):
    words = ["inspect", "--model", "llama-2-7b", "--config", "mosld:num_experts=8/6/4/2", "--config", "hydralora"]
    assert main([*words, "--json", "--output", str(tmp_path / "out")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert report == count("llama-2-7b", ["mosld:num_experts=8/6/4/2", "hydralora"])
    assert main([*words, "--target-modules", "q_proj,v_proj"]) == 0  # what PEFT chooses as well
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "llama-2-7b: 6,738,415,616 parameters"
    rows = [line.split() for line in lines if line.startswith(("mosld:", "hydralora"))]
    assert rows[0] == [
        "mosld:num_experts=8/6/4/2", "13,893,632", "0.206", "2,097,152", "10,485,760", "1,310,720", "0", "64", "2",
        "to", "8", "1.29", "2,304",
    ]  # fmt: skip
    assert rows[1][:7] == ["hydralora", "9,175,040", "0.136", "2,097,152", "6,291,456", "786,432", "0"]
    assert rows[2] == [
        "mosld:num_experts=8/6/4/2", "q_proj", "4096", "->", "4096", "8", "8", "327,680", "32,768", "262,144",
        "32,768", "0", "1.95", "48",
    ]  # fmt: skip
    assert len(rows) == 2 + 8 + 2
    assert cost_text(report) == "\n".join(lines)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give the folder of an ADAPTER, or --model NAME"),
        (["--config", "mosld"], "give the folder of an ADAPTER, or --model NAME"),
        (["somewhere", "--config", "mosld"], "leave out ADAPTER"),
        (["somewhere", "--target-modules", "q_proj"], "leave out ADAPTER"),
        (["--model", "gpt2", "--task", "a=a.jsonl"], "--task is for an ADAPTER"),
        (["--model", "gpt2", "--quick"], "--quick is for --model embedded"),
        (
            ["--model", "llama-9"],
            "model must be one of llama-2-7b, .*, embedded, or a folder with config.json, got 'llama-9'",
        ),
        (["--model", "EMPTY"], "holds no config.json of a model that transformers knows"),
        (
            ["--model", "gpt2", "--config", "mosldd"],
            "config must be one of lora, mosld, .* got 'mosldd': there is no such file",
        ),
        (
            ["--model", "gpt2", "--config", "mosld:rank=8"],
            "mosld:rank=8: there is no field rank; there are: .*num_experts,.* r,",
        ),
        (["--model", "gpt2", "--target-modules", "c_atn"], "no module is called 'c_atn', the nearest are c_attn"),
        (["--model", "vit-base"], "no modules to adapt in vit-base by itself: .* are called .*dense"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(words, message, tmp_path, capsys):
    words = [str(tmp_path) if word == "EMPTY" else word for word in words]
    assert main(["inspect", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("mosld inspect: ")
    assert re.search(message, err), err
