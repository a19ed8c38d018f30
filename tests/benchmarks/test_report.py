"""The short run writes every result, and the report says what they hold, losing cells and missed targets included."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cpu import scaling
from benchmarks.peers.known import FROZEN, LORA, OURS, PEERS
from benchmarks.report import bench, page, targets
from benchmarks.timing.shapes import LAYERS

from .commands import run

ROOT = Path(__file__).parents[2]


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
        page.write_page([path], tmp_path / "page.md")
    assert [p.name for p in tmp_path.iterdir()] == ["other.json"]


def test_the_sweep_over_experts_compares_64_with_8():
    tables = [
        {**table.keys, "verb": "scaling", "shape": table.shape._asdict(),
         "rows": [{"name": OURS, "step": "both", "median_ms": float(table.shape.E)}]}
        for table in scaling.tables(["E"])
    ]  # fmt: skip
    assert targets._experts(tables) == 8.0
