"""The tuner without a GPU: what the compiler rules out, what is forced, who wins, and what the file then says."""

import contextlib
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks.gpu import device
from benchmarks.timing import files
from benchmarks.timing.shapes import LAYERS
from benchmarks.timing.timers import Timing, interleaved
from benchmarks.tune import candidates, choice
from benchmarks.tune import run as tune
from benchmarks.tune.candidates import Case, forced
from benchmarks.tune.choice import Measurement, choose
from mosld_kernels.triton import launch, tiles
from mosld_kernels.triton.tiles import Row, Tile

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels are compiled, not for CPU")
A, B, C = Tile(64, 128, 0, 4, 3, 128), Tile(32, 64, 0, 4, 3, 128), Tile(32, 128, 0, 4, 3, 128)


def case(name="gpu-4096", kernel="down", dtype="bfloat16"):
    return Case(kernel, name, LAYERS[name], dtype, 90)


def measurement(one, ms, default=None):
    """ms: tile -> milliseconds, the default's under None; a default of the test's own, whatever the table says"""
    row = default or Row(one.kernel, Tile(16, 16, 0, 4, 1))
    times = {tile or row.tile: Timing(time_ms, time_ms, time_ms) for tile, time_ms in ms.items()}
    return Measurement(one, row, times, {}, 10**6)


def stand_in(times):
    """A timer that runs each candidate once and says that it took times[place] milliseconds, and the rest 9."""

    def timer(candidates, *, rounds=1):
        told = dict(enumerate(times))
        for run in candidates.values():
            run()
        return {name: Timing(told.get(i, 9.0), 1.0, 9.0) for i, name in enumerate(candidates)}

    return timer


@pytest.mark.slow
def test_the_compiler_drops_hopeless_tiles_and_keeps_the_default():
    settings = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "MOSLD_TILES")}
    program = [sys.executable, "-W", "error", "-m", "tests.benchmarks.tune_compiled"]
    result = subprocess.run(program, capture_output=True, text=True, cwd=ROOT, env=settings)
    assert result.returncode == 0, result.stderr[-3000:]
    counted, told = result.stdout.splitlines()
    assert counted == "8 launches compiled: 4 candidates dropped before they run"
    told = json.loads(told)
    assert told["left"] == {arch: [True] for arch in ("80", "89", "90", "100")}
    assert "bytes of shared memory, 232448 at most" in told["faults"]["shared"][0]
    assert "bytes of registers spilled" in told["faults"]["spills"][0]
    assert "does not compile" in told["faults"]["fails"][0]
    assert told["launched"] == {
        "(64, 128, 0, 4, 3, 255)": [64, 128, 4, 3, 255],
        "(32, 64, 0, 8, 2, 96)": [32, 64, 8, 2, 96],
    }


def test_candidates_are_few_valid_and_led_by_the_default(tmp_path):
    for kernel in tiles.KERNELS:
        for name, shape in LAYERS.items():
            for arch in (80, 86, 90, 100, 120):
                for dtype in ("bfloat16", "float32"):
                    one = Case(kernel, name, shape, dtype, arch)
                    found = candidates.candidates(one)
                    assert found[0] == one.default().tile and len(set(found)) == len(found) <= 12
    path = tmp_path / "all.json"
    known = [Row(kernel, tile) for (kernel, _), found in candidates.CANDIDATES.items() for tile in found]
    path.write_text(json.dumps([tune.as_json(row) for row in known]))
    assert tiles.read_rows(str(path)) == known


def test_forcing_a_tile_goes_before_every_row_and_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps([tune.as_json(Row("down", C))]))
    monkeypatch.setenv("MOSLD_TILES", str(path))
    x = torch.empty(8, 16)
    for _ in range(2):  # the second time from the cache
        assert launch.tile_for("down", 8, 16, 0, 4, x) == C
        with forced(Row("down", A)):
            assert launch.tile_for("down", 8, 16, 0, 4, x) == A
            with forced(Row("down", B)):
                assert launch.tile_for("down", 8, 16, 0, 4, x) == B
            assert launch.tile_for("grad_down", 8, 16, 0, 4, x) != A
    with pytest.raises(ZeroDivisionError), forced(Row("down", A)):
        _ = 1 / 0
    assert launch.tile_for("down", 8, 16, 0, 4, x) == C


def test_a_tile_must_gain_more_than_3_percent():
    for ms, wins in ((0.96, True), (0.975, False), (1.2, False)):
        (verdict,) = choose([measurement(case(), {None: 1.0, B: ms, A: 1.5})])
        assert verdict.is_new() == wins and verdict.best == B and verdict.ratio == ms
        text = choice.summary([verdict])
        assert f"{1e3 * ms:.1f} us, default 1000.0 us" in text
        assert ("stays" in text) != wins and ("Row(" in text) == wins
    assert verdict.row.tile == verdict.default.tile
    (verdict,) = choose([measurement(case(), {None: 1.0})])
    assert not verdict.is_new() and "the default stays" in choice.summary([verdict])


def test_shapes_with_the_same_bounds_share_a_row_and_none_may_lose():
    small, large = case("gpu-2048"), case("gpu-14336-4096")
    both = [measurement(small, {None: 1.0, A: 0.5, B: 0.8}), measurement(large, {None: 2.0, A: 2.2, B: 1.8})]
    (verdict,) = choose(both)
    assert verdict.row == Row("down", B, arch=90, bytes=2, columns_to=24, tokens_to=8192)
    assert verdict.ratio == pytest.approx((0.8 * 0.9) ** 0.5)
    (verdict,) = choose([both[0], measurement(large, {None: 2.0, A: 1.9})])  # B was wrong at one of them
    assert verdict.row.tile == A


def test_a_new_row_hides_neither_measured_nor_listed_smaller_sizes(tmp_path, monkeypatch):
    listed = Row("up_backward", C._replace(columns=64), bytes=2, columns_to=128, tokens_to=512)
    broad = Row("up_backward", A._replace(columns=64), bytes=2)
    other = Row("down", A)
    known, new = [other, listed, broad], B._replace(columns=64)
    few, many = (case(name, "up_backward") for name in ("gpu-4096-t1024", "gpu-4096"))
    verdicts = choose([measurement(many, {None: 1.0, new: 0.5}, broad), measurement(few, {None: 1.0, new: 1.1}, broad)])
    guard, winner = few.row(broad.tile), many.row(new)
    assert choice.insertions(verdicts) == {broad: [guard, winner]}
    found = choice.file_rows(verdicts, known, 90)
    assert found == [listed._replace(arch=90), guard, winner]
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps([tune.as_json(row) for row in found]))
    assert tiles.read_rows(str(path)) == found
    monkeypatch.setenv("MOSLD_TILES", str(path))
    picked = [tiles.pick("up_backward", 90, tokens, 0, 4096, 128, 2) for tokens in (300, 1000, 1025, 8192)]
    assert picked == [found[0], guard, winner, winner]
    beyond = (90, 8193, 0, 4096, 128, 2), (90, 8192, 0, 4096, 129, 2), (80, 8192, 0, 4096, 128, 2)
    assert not {tiles.pick("up_backward", *sizes) for sizes in beyond} & set(found)
    larger_only = choose([measurement(few, {None: 1.0, new: 0.5}, broad), measurement(many, {None: 1.0}, broad)])
    assert choice.insertions(larger_only) == {broad: [few.row(new)]}  # nothing to say of what lies beyond


def test_rows_are_printed_as_the_table_of_tiles_has_them():
    row = Row("down", A, arch=90, bytes=2, columns_to=24, tokens_to=8192)
    text = choice.row_text(row)
    assert text == 'Row("down", Tile(64, 128, 0, 4, 3, 128), arch=90, bytes=2, columns_to=24, tokens_to=8192),'
    assert eval(text)[0] == row  # it is Python


def test_a_wrong_result_never_wins():
    truth = torch.randn(4096, 8)

    def unwritten():
        out = torch.empty_like(truth)
        out[:-1] = truth[:-1]
        return (out,)

    def one_token_wrong():
        out = truth.clone()
        out[7] = 0
        return (out,)

    def fails():
        raise RuntimeError("out of resources")

    runs = {A: lambda: (truth,), B: unwritten, C: one_token_wrong, C._replace(stages=9): fails}
    told = tune.wrong(runs, A, tune.TOLERANCES[2])
    assert set(told) == set(runs) - {A}
    assert told[B] == "relative error inf to the default's result" and "out of resources" in told[C._replace(stages=9)]
    assert not torch.are_deterministic_algorithms_enabled()


@interpreted
def test_a_wrong_tile_is_not_timed_however_fast(monkeypatch):
    one = Case("down", "toy", LAYERS["toy"], "float32", 80)
    default = one.default().tile
    real = tune.down

    def broken(x, *rest):
        hidden, *others = real(x, *rest)
        return hidden + (launch.tile_for("down", 64, 32, 0, 8, x) == B), *others

    monkeypatch.setattr(tune, "down", broken)
    found = tune.measure(one, [default, B, C], CPU, stand_in([2.0, 1.0]))
    assert set(found.times) == {default, C} and "relative error" in found.dropped[B]
    assert "dropped: relative error" in choice.times_text(found)
    with pytest.raises(RuntimeError, match="the default Tile.*no time measured"):
        tune.measure(one, [default, C], CPU, stand_in([0.0, 1.0]))


@interpreted
def test_rehearsed_at_toy_size_in_the_interpreter(capsys):
    wanted = tune.cases(tiles.KERNELS, ["toy"], ["float32"], 80)
    chosen = {one: candidates.candidates(one)[:3] for one in wanted}
    measured = tune.measure_all(chosen, CPU, partial(interleaved, rounds=2), time.monotonic() + 100)
    assert [one.case.kernel for one in measured] == list(tiles.KERNELS)
    for one in measured:
        assert len(one.times) == 3 and not one.dropped and one.default.tile in one.times
        assert one.operand_bytes == 4 * 64 * (32 if "down" in one.case.kernel else 48)
    printed = capsys.readouterr().out
    assert printed.count("GB/s") == 12 and "down toy float32: 64 tokens, 32 -> 48, R=4, E=4, K=2" in printed


@interpreted
def test_what_won_is_written_and_then_picked(tmp_path, monkeypatch, capsys):
    out, seen = tmp_path / "new" / "tiles.json", []
    wanted = tune.cases(["down", "grad_down"], ["toy"], ["float32"], 80)
    chosen = {one: [one.default().tile, B._replace(columns=32)] for one in wanted}
    monkeypatch.setattr(tune, "write", lambda rows, path: (files.write(rows, path), seen.append(len(rows))))
    tune.measure_all(chosen, CPU, stand_in([2.0, 1.0]), time.monotonic() + 100, out)
    assert seen == [1, len(tiles.read_rows(str(out)))]
    monkeypatch.setenv("MOSLD_TILES", str(out))
    for one in wanted:
        expected = Row(one.kernel, B._replace(columns=32), arch=80, bytes=4, columns_to=8, tokens_to=64)
        assert one.default() == expected and one._replace(shape=one.shape._replace(T=65)).default() != expected
        assert choice.row_text(expected) in capsys.readouterr().out or one is wanted[1]


@interpreted
def test_an_interruption_a_failure_and_a_used_budget_keep_what_was_measured(tmp_path, capsys):
    wanted = tune.cases(tiles.KERNELS, ["toy"], ["float32"], 80)
    chosen = {one: [one.default().tile, candidates.candidates(one)[1]] for one in wanted}
    good, calls = stand_in([2.0, 1.0]), []

    def third(error):
        def timer(candidates, *, rounds=1):
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("no luck")
            if len(calls) == 3:
                raise error
            return good(candidates)

        return timer

    out = tmp_path / "tiles.json"
    with pytest.raises(KeyboardInterrupt):
        tune.measure_all(chosen, CPU, third(KeyboardInterrupt), time.monotonic() + 100, out)
    printed = capsys.readouterr().out
    assert "up_backward toy float32 failed: RuntimeError: no luck" in printed and "above Row(" in printed
    assert [row.tile for row in tiles.read_rows(str(out))][-1] == chosen[wanted[0]][1]
    calls.clear()
    measured = tune.measure_all(chosen, CPU, third(ValueError), time.monotonic() + 100, lost=lambda: True)
    assert len(measured) == 1 and len(calls) == 2
    assert tune.measure_all(chosen, CPU, good, time.monotonic()) == [] and "budget is used" in capsys.readouterr().out


@interpreted
def test_the_command_counts_what_was_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(device, "nvidia_gpu", lambda: CPU)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(tune, "survivors", lambda wanted: {one: candidates.candidates(one)[:2] for one in wanted})
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: device)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "no GPU")
    monkeypatch.setattr(tune, "TIMER", stand_in([2.0, 1.0]))
    out = tmp_path / "tiles.json"
    arguments = ["--shape", "toy", "toy", "--dtype", "float32", "--kernel", "down", "--out", str(out)]
    assert run_command(monkeypatch, *arguments) == 0
    assert "1 of 1 cases measured on no GPU" in capsys.readouterr().out and len(tiles.read_rows(str(out))) == 1
    assert run_command(monkeypatch, *arguments, "--budget", "0") == 1
    assert "0 of 1 cases" in capsys.readouterr().out


def run_command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "tune", *arguments])
    return command.main()


def test_without_a_gpu_the_command_says_so_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_command(monkeypatch, "--out", str(tmp_path / "tiles.json")) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernel", "up"], "there is no kernel up; there are: down, up_backward, grad_expert_b, grad_down"),
        (["--shape", "huge", "toy"], "there is no shape huge; there are: cpu-1024"),
        (["--dtype", "int8"], "there is no dtype int8; there are: float32, bfloat16, float16"),
    ],
)
def test_unknown_names_list_what_exists(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(device, "nvidia_gpu", lambda: CPU)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert run_command(monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err


def test_an_interpreter_is_not_measured(capsys, monkeypatch):
    monkeypatch.setattr(device, "nvidia_gpu", lambda: CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert run_command(monkeypatch) == 2 and "unset it" in capsys.readouterr().err
    options = command._parser().parse_args(["tune"])
    assert len(options.shape) == 6 and options.dtype == ["bfloat16"] and options.kernel is None
