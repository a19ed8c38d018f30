"""The benchmarks run at toy size through their commands, peers compute what they say, and nothing measured is lost."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import __main__ as command
from benchmarks.cpu import calls, layer, memory, scaling, training
from benchmarks.cpu import steps as kernels
from benchmarks.model import cpu as cpu_model
from benchmarks.peers import compare
from benchmarks.peers.known import FROZEN, LORA, OURS, PEERS, Mixture, build, choose, equal_rank, parameters_of
from benchmarks.report import bench, targets
from benchmarks.report import page as report
from benchmarks.timing.shapes import LAYERS, LayerShape
from benchmarks.timing.timers import Budget
from mosld_kernels import reference

ROOT = Path(__file__).parents[2]
TWICE = Budget(2, 60.0, 2)
TOY = LAYERS["toy"]
FEW = choose((OURS, LORA))


def run(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["python -m benchmarks", *map(str, arguments)])
    return command.main()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Every verb that runs on a CPU, at toy size -> the folder with its results and the report."""
    folder = tmp_path_factory.mktemp("bench")
    arguments = ["bench", "--toy", "--results", str(folder), "--out", str(folder / "performance.md")]
    done = subprocess.run([sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_the_short_run_writes_every_file_the_report_and_its_charts(whole):
    for name in bench.FILES:
        result = json.loads((whole / f"{name}.json").read_text())
        assert {"processor", "torch", "commit", "threads"} <= set(result["machine"]) and result["tables"], name
    text = (whole / "performance.md").read_text()
    for heading in (
        "Targets on a CPU",
        "One layer",
        "How cost grows",
        "Memory kept",
        "end to end",
        "steps",
        "On a GPU",
    ):
        assert heading in text, heading
    assert "Not measured on a GPU" in text and "Not run: MoSLD, Triton (Absent: Triton's kernels need" in text
    charts = {"overhead.png", "by_experts.png", "by_tokens.png", "memory.png", "roofline.png"}
    assert {path.name for path in (whole / "performance").iterdir()} == charts
    assert all(f"performance/{name}" in text for name in charts)


@pytest.mark.slow
def test_the_rows_are_whole(whole):
    table = json.loads((whole / "peers.json").read_text())["tables"][0]
    rows = {(row["name"], row.get("step")): row for row in table["rows"]}
    ran = {name for name in PEERS if (name, "both") in rows}
    absent = {row["name"] for row in table["rows"] if "failure" in row}
    assert ran | absent == set(PEERS) and {FROZEN, OURS, LORA, "HydraLoRA loop", "MoLA loop", "PEFT Lily"} <= ran
    for name in ran:
        steps = [rows[name, step] for step in ("forward", "backward", "both")]
        assert all(row["low_ms"] <= row["median_ms"] <= row["high_ms"] and row["of_limit"] > 0 for row in steps)
        assert steps[2]["error"] < 1e-5 and steps[2]["saved_bytes"] >= 0
    assert rows[FROZEN, "both"]["ratio"] == 1
    ours = rows[OURS, "both"]
    assert ours["over_model"] == pytest.approx(ours["median_ms"] / ours["model_ms"])


def test_saved_bytes_are_counted_exactly():
    rows = {r["name"]: r for r in compare.compare(FEW, TOY, torch.float32, TWICE) if r["step"] == "both"}
    T, _, _, R, E, _ = TOY
    assert rows[FROZEN]["saved_bytes"] == 0
    assert rows[OURS]["saved_bytes"] == 4 * T * (R + E) + 8  # hidden, gates, seed
    assert rows[LORA]["saved_bytes"] > 4 * T * TOY.D_in  # the dropped x at least


def test_a_failing_peer_is_told_and_the_rest_goes_on(monkeypatch, tmp_path, capsys):
    def broken(linear, mixture):
        raise RuntimeError("no luck\nat all")

    monkeypatch.setitem(PEERS, "broken", broken)
    out = tmp_path / "layer.json"
    layer.run(layer.layers(["toy"], ["float32"]), choose((OURS, "broken")), TWICE, out)
    rows = json.loads(out.read_text())["tables"][0]["rows"]
    assert {"name": "broken", "failure": "RuntimeError: no luck"} in rows
    assert {row["name"] for row in rows} == {FROZEN, OURS, "broken"}
    assert "no luck" in capsys.readouterr().out
    memory.run(["toy"], "float32", choose((OURS, "broken")), out)
    assert {"name": "broken", "failure": "RuntimeError: no luck"} in json.loads(out.read_text())["tables"][0]["rows"]


def test_an_interruption_keeps_what_was_measured(monkeypatch, tmp_path):
    measured = layer.compare
    seen = []

    def interrupted(*args, **kwargs):
        if seen:
            raise KeyboardInterrupt
        seen.append(1)
        return measured(*args, **kwargs)

    monkeypatch.setattr(layer, "compare", interrupted)
    out = tmp_path / "layer.json"
    code = run(monkeypatch, "layer", "--shape", "toy", "--peers", OURS, "--rounds", 2, "--out", out)
    assert code == 130
    tables = json.loads(out.read_text())["tables"]
    assert len(tables) == 1 and tables[0]["rows"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layer", "--shape", "huge"], "there is no shape huge; there are: cpu-1024"),
        (["layer", "--peers", "hydra"], "there is no peer 'hydra'; there are: 'frozen linear', "),
        (["layer", "--dtype", "int8"], "there is no int8; there are: float32, bfloat16, float16"),
        (["layer", "--checkout", "/nowhere"], "checkout must be a folder, got /nowhere"),
        (["layer", "--rounds", "1"], "rounds must be at least 2, got 1"),
        (["kernels", "--seconds", "0"], "seconds must be positive, got 0.0"),
        (["kernels", "--dtype", "int8"], "there is no int8; there are: float32, bfloat16, float16"),
        (["memory", "--dtype", "int8"], "there is no int8; there are: float32"),
        (["scaling", "--sweep", "X"], "there is no sweep X; there are: T, E, R, K, dtype"),
        (["training", "--size", "huge"], "there is no size huge; there are: toy, small"),
        (["training", "--targets", "k"], "there are no targets k; there are: all, qv"),
        (["report", "/nowhere.json"], "/nowhere.json cannot be read as JSON"),
    ],
)
def test_what_does_not_exist_is_answered_by_what_does(arguments, message, monkeypatch, capsys):
    assert run(monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_verb_lists_the_verbs(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "everything")
    said = capsys.readouterr().err
    for verb in ("kernels", "layer", "training", "memory", "scaling", "roofline", "gpu", "report", "bench"):
        assert f"'{verb}'" in said


def test_the_peers_work_on_the_same_weight_and_are_what_they_claim():
    linear, x = nn.Linear(12, 10).double().requires_grad_(False), torch.randn(6, 12, dtype=torch.float64)
    everyone = Mixture(r=3, num_experts=4, top_k=4, dropout=0.0)
    torch.manual_seed(1)
    ours = build(OURS, linear, everyone)
    adapter = ours.adapter
    tensors = (adapter.shared_a.weight, adapter.expert_b.weight, adapter.router.weight)
    truth, _ = reference.mosld_linear(x, linear.weight, linear.bias, *tensors, top_k=4, scale=2.0)
    torch.testing.assert_close(ours(x), truth)
    # Without dropout and with every expert chosen, these are MoSLD's formula.
    for name in ("formula in plain torch", "concatenated product", "HydraLoRA loop"):
        peer = build(name, linear, everyone)
        peer.layer.adapter.load_state_dict(adapter.state_dict())
        torch.testing.assert_close(peer(x), truth, msg=name)
    # The same of two experts of four, for the one that chooses.
    peer = build("concatenated product", linear, Mixture(3, 4, 2, 0.0))
    peer.layer.adapter.load_state_dict(adapter.state_dict())
    few, _ = reference.mosld_linear(x, linear.weight, linear.bias, *tensors, top_k=2, scale=2.0)
    torch.testing.assert_close(peer(x), few)
    # MoLA's loop, whose experts have an A each: with equal ones it is MoSLD.
    loop = build("MoLA loop", linear, Mixture(3, 4, 2, 0.0))
    with torch.no_grad():
        for e in range(4):
            loop.a[e].copy_(tensors[0])
            loop.b[e].copy_(tensors[1].view(10, 4, 3)[:, e])
        loop.router.copy_(tensors[2])
    torch.testing.assert_close(loop(x), few)
    # And the loop in one fused operator, whatever the A's are.
    own = build("ours, an A per expert (MoLA)", linear, Mixture(3, 4, 2, 0.0))
    with torch.no_grad():
        for e in range(4):
            loop.a[e].copy_(own.adapter.shared_a.weight.view(4, 3, 12)[e])
            loop.b[e].copy_(own.adapter.expert_b.weight.view(10, 4, 3)[:, e])
        loop.router.copy_(own.adapter.router.weight)
    torch.testing.assert_close(own(x), loop(x))
    lora = build("PEFT LoRA", linear, everyone)
    update = lora.lora_B["default"](lora.lora_A["default"](x)) * lora.scaling["default"]
    torch.testing.assert_close(lora(x), linear(x) + update)
    fused = build("fused LoRA pattern, no dropout", linear, everyone)
    torch.testing.assert_close(fused(x), linear(x) + 2 * x @ fused.a.t() @ fused.b.t())


@pytest.mark.parametrize("name", [name for name in PEERS if "compiled" not in name])
def test_a_step_gives_every_trained_tensor_its_gradient(name):
    linear, x, dout = compare.inputs_of(TOY, torch.float64, torch.device("cpu"))
    try:
        module = build(name, linear, Mixture(3, 4, 2, 0.0))
    except RuntimeError as absent:
        assert type(absent).__name__ == "Absent" and str(absent)
        return
    forward, backward = compare.phases_of(module, x, dout)
    grads = backward(forward())
    assert len(grads) == 1 + sum(p.requires_grad for p in module.parameters())
    # Finite differences along one direction through all of them.
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    directions, h = [torch.randn_like(t) for t in wanted], 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for tensor, direction in zip(wanted, directions, strict=True):
                tensor.add_(direction, alpha=sign * h)
            values.append((forward() * dout).sum())
            for tensor, direction in zip(wanted, directions, strict=True):
                tensor.sub_(direction, alpha=sign * h)
    slope = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
    torch.testing.assert_close((values[0] - values[1]) / (2 * h), slope, rtol=1e-4, atol=1e-4)


def test_the_rank_of_equal_parameters():
    linear, mixture = nn.Linear(1024, 1024, device="meta"), Mixture(8, 8, 2, 0.1)
    assert parameters_of(linear, mixture) == 1024 * (8 + 8 * 8 + 8) == 81_920
    assert equal_rank(linear, mixture) == 40  # 2 * 1024 * 40 = 81,920


def test_losing_cells_and_missed_targets_are_told(tmp_path, monkeypatch):
    def rows(**times):
        names = {"frozen": FROZEN, "ours": OURS, "lora": LORA}
        common = dict(low_ms=1.0, high_ms=2.0, saved_bytes=0, parameters=1, error=1e-7, of_limit=0.5)
        return [
            {"name": names[key], "step": step, "median_ms": t, "ratio": t / times["frozen"], **common}
            for key, t in times.items()
            for step in ("forward", "backward", "both")
        ]

    def table(name, **times):
        return {"name": name, "shape": LAYERS[name]._asdict(), "dtype": "float32", "rows": rows(**times)}

    machine = dict(processor="a processor", threads=2, torch="2", commit="abc")
    losing = table("cpu-1024", frozen=10.0, ours=13.0, lora=12.0)
    decoding = table("decode-2048", frozen=10.0, ours=13.0, lora=12.0)
    result = {"verb": "layer", "machine": machine, "settings": {}, "tables": [losing, decoding]}
    path = tmp_path / "layer.json"
    path.write_text(json.dumps(result))
    assert run(monkeypatch, "report", path, "--out", tmp_path / "page.md") == 0
    text = (tmp_path / "page.md").read_text()
    assert "Faster than MoSLD (1.30): PEFT LoRA (1.20)." in text
    assert "| 4096 tokens, 1024 → 1024, float32: over the frozen layer | ≤ 1.15 | 1.30 | **no** |" in text
    assert "| 1 token, 2048 → 2048, float32, trained: over PEFT LoRA | ≤ 1.50 | 1.08 | yes |" in text
    assert "| 64 experts over 8, two chosen | ≤ 1.60 | not measured | - |" in text


def test_a_file_of_another_kind_is_refused_before_anything_is_written(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"verb": "dance"}')
    with pytest.raises(ValueError, match="other.json is no result of .*: its verb is 'dance'"):
        report.run([path], tmp_path / "page.md")
    assert [p.name for p in tmp_path.iterdir()] == ["other.json"]


def test_the_sweep_over_experts_compares_64_with_8():
    tables = [
        {**table.keys, "verb": "scaling", "shape": table.shape._asdict(),
         "rows": [{"name": OURS, "step": "both", "median_ms": float(table.shape.E)}]}
        for table in scaling.tables(["E"])
    ]  # fmt: skip
    assert targets._experts(tables) == 8.0


def test_sweeps_vary_one_size_and_keep_k_within_e():
    shapes = [table.shape for table in scaling.tables(["E", "T", "R", "K"])]
    assert {s.E for s in shapes} == {1, 2, 4, 8, 16, 32, 64} and {s.R for s in shapes} == {4, 8, 16, 32, 64, 128}
    assert {s.T for s in shapes} == {1, 16, 256, 1024, 4096, 16384, 65536} and {s.K for s in shapes} == {1, 2, 4, 8}
    assert all(s.K <= s.E for s in shapes)
    assert [table.dtype for table in scaling.tables(["dtype"])] == ["float32", "bfloat16", "float16"]


def test_the_model_of_the_cpu_prices_products_and_passes():
    rates = cpu_model.Rates(copy_bytes=10e9, matmul_flops=100e9)
    p = cpu_model.problem(LayerShape(1000, 500, 400, 8, 4, 2), rates, torch.float32)
    frozen = cpu_model.predict(FROZEN, p)
    assert frozen["forward"] == pytest.approx(1e3 * 2 * 1000 * 500 * 400 / 100e9)
    ours, bound = cpu_model.predict(OURS, p), cpu_model.limit(p)
    assert frozen["both"] < bound["both"] <= ours["both"] < cpu_model.predict("HydraLoRA loop", p)["both"]
    assert cpu_model.predict("PEFT Lily", p) is None


def test_what_is_too_slow_here_is_left_out_with_the_reason(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(layer, "LONGEST_STEP_S", 0.0)
    layer.run(layer.layers(["toy"], ["float32"]), FEW, TWICE, tmp_path / "layer.json")
    entry = json.loads((tmp_path / "layer.json").read_text())["tables"][0]
    assert "float32 products run at" in entry["left_out"] and "rows" not in entry
    assert "left out" in capsys.readouterr().out
    report.run([tmp_path / "layer.json"], tmp_path / "page.md")
    assert "Left out: float32 products run at" in (tmp_path / "page.md").read_text()


def test_every_step_of_the_operator_is_timed_beside_its_model():
    rates = cpu_model.Rates(copy_bytes=10e9, matmul_flops=100e9)
    rows = kernels.measure(TOY, "float32", rates, TWICE, "toy")
    names = {row["name"].strip() for row in rows}
    assert {"down, routing and mix", "up", "grad_expert_b", "up_backward", "down_backward", "dx"} <= names
    assert all(row["model_ms"] > 0 and row["over_model"] > 0 for row in rows if row["bytes"])


def test_every_targeted_linear_of_the_small_model_is_adapted_and_the_base_is_shared():
    size = training.SIZES["toy"]
    base = training.base_model(size)
    for which, count in (("all", 7), ("qv", 2)):
        model = training.adapted(base, OURS, which, size.mixture)
        assert sum(type(m).__name__ == "MoSLDLinear" for m in model.modules()) == count * size.layers
        shared = {p.data_ptr() for p in base.parameters()}
        frozen = [p for p in model.parameters() if not p.requires_grad]
        assert {p.data_ptr() for p in frozen} == shared
        ids = torch.randint(size.vocabulary, (2, 8))
        forward, backward = training.step_of(model, ids)
        backward(forward())
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_two_ways_into_the_operator_are_timed(tmp_path):
    result = calls.run(2, tmp_path / "calls.json")
    assert json.loads((tmp_path / "calls.json").read_text()) == result
    assert len(result["calls"]) == 6 and all(row["low_us"] > 0 for row in result["calls"])
