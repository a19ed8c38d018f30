"""`mosld compare`: the same data for every method, no cell run twice, and numbers that follow from the items."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy
import pytest
from transformers import Trainer

from mosld.cli.main import main
from mosld.experiments import compare as compare_module
from mosld.experiments import compare_report
from mosld.experiments.intervals import interval, t_quantile
from mosld.experiments.methods import Adapter
from mosld.experiments.plan import plan_comparison
from mosld.experiments.rows import Row, layer_list, swept_options
from mosld.experiments.stages import Interrupted, count_trained
from tests.cli.test_cli import data, words  # noqa: F401  the tiny model and its two tasks
from tests.helpers.kills import killed_at_every_change
from tests.helpers.models import tiny_llama

FAST = ["--num_train_epochs", "1", "--per_device_train_batch_size", "8", "--learning_rate", "1e-2", "--use_cpu", "true",
        "--logging_steps", "1", "--warmup_steps", "0.1", "--save_strategy", "no"]  # fmt: skip
ROOT = Path(__file__).parents[2]
METHODS = "lora_equal,mtl_lora,mosld"


def call(folder, output, *more, methods=METHODS, seeds=2, setting="both"):
    own = ["--methods", methods, "--seeds", str(seeds), "--setting", setting]
    return main(words(folder, output, *own, *FAST, *more, command="compare"))


@pytest.fixture(scope="module")
def batches() -> list[dict]:
    return []


@pytest.fixture(scope="module")
def run(data, tmp_path_factory, batches):  # noqa: F811
    """Three methods, both settings, two seeds; `batches` gets every batch that was trained on, in order."""
    output, step = tmp_path_factory.mktemp("compare") / "out", Trainer.training_step

    def recorded(trainer, model, inputs, *rest):
        batches.append({name: value.tolist() for name, value in inputs.items()} | {"where": trainer.args.output_dir})
        return step(trainer, model, inputs, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "training_step", recorded)
        assert call(data, output) == 0
    return output


def told(run) -> dict:
    return json.loads((run / "compare.json").read_text())


def line(run, row, setting) -> dict:
    return next(own for own in told(run)["rows"] if (own["row"], own["setting"]) == (row, setting))


def test_every_number_follows_from_the_items(run):
    assert {(own["row"], own["setting"]) for own in told(run)["rows"]} == {
        (row, setting) for row in METHODS.split(",") for setting in ("mixture", "single")
    }
    for own in told(run)["rows"]:
        hits = {task: numpy.array([[int(c) for c in seed] for seed in seeds]) for task, seeds in own["items"].items()}
        assert {task: array.shape for task, array in hits.items()} == {"even": (2, 24), "vowel": (2, 14)}
        for task, array in hits.items():
            assert own["accuracy"][task]["mean"] == pytest.approx(array.mean())
            assert own["accuracy"][task]["std"] == pytest.approx(array.mean(1).std(ddof=1))
        per_seed = sum(array.mean(1) for array in hits.values()) / 2
        assert own["average"]["per_seed"] == pytest.approx(per_seed)
        assert own["average"]["mean"] == pytest.approx(per_seed.mean())
        if own["row"] == "mosld":
            assert "difference" not in own
            continue
        other = line(run, "mosld", own["setting"])["items"]
        for task, array in hits.items():
            paired = array - numpy.array([[int(c) for c in seed] for seed in other[task]])
            assert own["difference"][task]["mean"] == pytest.approx(paired.mean())
            assert own["difference"][task]["low"] == pytest.approx(interval([paired]).low)


def test_items_are_those_of_the_stages_and_scores(run):
    stage = json.loads((run / "stages" / "mosld-single-vowel-seed1.json").read_text())
    assert line(run, "mosld", "single")["items"]["vowel"][1] == stage["items"]["vowel"]
    assert stage["items"]["vowel"].count("1") / 14 == stage["tasks"]["vowel"]["accuracy"]


def test_for_a_seed_every_method_sees_the_same_examples_in_the_same_order(run, batches):
    def seen(cell):
        return [batch["input_ids"] for batch in batches if batch["where"].endswith(f"/{cell}")]

    assert len(seen("mosld-seed0")) == 5
    for cell in ("seed0", "seed1", "single-vowel-seed0"):
        assert seen(f"mosld-{cell}") == seen(f"lora_equal-{cell}") == seen(f"mtl_lora-{cell}")
    assert seen("mosld-seed0") != seen("mosld-seed1")


def test_single_adapters_take_the_mixtures_steps_and_see_every_example_as_often(run, batches):
    single = [b for b in batches if "/mosld-single-" in b["where"] and b["where"].endswith("seed0")]
    mixture = [b for b in batches if b["where"].endswith("/mosld-seed0")]
    assert len(single) == len(mixture) == 5

    def rows(some):
        return sorted([i for i in row if i != 1] for batch in some for row in batch["input_ids"])

    assert rows(single) == rows(mixture) and len(rows(mixture)) == 38


def test_task_routed_methods_are_told_each_rows_task(run, batches):
    own = [b for b in batches if b["where"].endswith("/mtl_lora-seed0")]
    pairs = {(row[0] == own_b, task) for b in own for row, task in zip(b["input_ids"], b["task_ids"], strict=True)
             for own_b in [_first_token("b")]}  # fmt: skip
    assert pairs == {(False, 0), (True, 1)}  # the prompts of the second task begin with a b
    assert all(set(b["task_ids"]) == {0} for b in batches if "/mtl_lora-single-vowel" in b["where"])
    assert not any("task_ids" in b for b in batches if "/mosld-" in b["where"])


def _first_token(text: str) -> int:
    from tests.tasks.test_scoring import byte_tokenizer

    return byte_tokenizer()(text).input_ids[0]


def test_the_equal_lora_has_the_nearest_number_of_parameters(run):
    rank = told(run)["settings"]["rows"]["lora_equal"]["adapter"]["options"]["r"]
    own, wanted = (line(run, row, "mixture")["trained_parameters"] for row in ("lora_equal", "mosld"))
    assert own % rank == 0
    assert abs(own - wanted) < min(abs(own / rank * (rank + more) - wanted) for more in (-1, 1))
    assert line(run, "mosld", "single")["trained_parameters"] == 2 * wanted


def test_the_page_and_the_charts_tell_compare_json(run):
    page = (run / "compare.md").read_text()
    own = line(run, "mtl_lora", "single")
    cell = f"{100 * own['average']['mean']:.1f} ± {100 * own['average']['std']:.1f} | {own['trained_parameters']:,} |"
    assert any(row.startswith("| MTL-LoRA | single |") and cell in row for row in page.splitlines())
    low, high = (100 * own["difference"]["average"][end] for end in ("low", "high"))
    assert f"[{low:+.1f}, {high:+.1f}] |" in page and "no evidence" in page
    assert page == compare_report.markdown(told(run))
    assert "Averages whose interval leaves out 0: none, of 4." in page
    for name in ("accuracy.png", "parameters.png"):
        assert (run / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def write_again(folder):
    before = told(folder)
    compare_report.write_comparison({**before, "rows": before["rows"][:-1]}, folder)


@pytest.mark.slow
def test_writing_again_that_is_killed_leaves_each_file_whole(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("adapters", "stages"))
    old, new = told(folder), {**told(folder), "rows": told(folder)["rows"][:-1]}
    pages = [compare_report.markdown(old), compare_report.markdown(new)]
    seen = []
    for _ in killed_at_every_change(write_again, folder):
        seen.append(([old, new].index(told(folder)), pages.index((folder / "compare.md").read_text())))
    assert seen == sorted(seen) and {seen[0], seen[-1]} == {(0, 0), (1, 1)}


def test_the_page_names_the_averages_that_are_more_than_their_interval(run):
    changed = told(run)
    for low, high in ((0.01, 0.03), (-0.03, -0.01), (-0.01, 0.01)):
        line = next(own for own in changed["rows"] if "difference" in own)
        line["difference"]["average"] = {"mean": (low + high) / 2, "low": low, "high": high}
        named = f"0: {line['title']}, {line['setting']}, " in compare_report.markdown(changed)
        assert named == (low * high > 0)


def test_the_page_of_the_committed_run_is_that_of_its_file():
    committed = json.loads((ROOT / "benchmarks/results/compare/compare.json").read_text())
    page = re.sub(r"\\\n +", "", (ROOT / "docs/results/compare.md").read_text())
    table, *_ = compare_report.markdown(committed).split(compare_report.EQUAL[:60])
    assert table in page and table in (ROOT / "benchmarks/results/compare/compare.md").read_text()
    (command,) = re.findall(r"^mosld compare --setting.*--num_train_epochs.*$", page, flags=re.MULTILINE)
    given = command.split()
    assert given[given.index("--seeds") + 1] == str(len(committed["seeds"]))
    for name, row in committed["settings"]["rows"].items():
        if name.endswith("-merged"):  # nothing is trained by the Trainer
            continue
        words = row["trainer"]
        last = len(words) - 1 - words[::-1].index("--num_train_epochs")
        assert words[last + 1] == given[given.index("--num_train_epochs") + 1]


@pytest.mark.parametrize("sweep", ["rank", "experts", "dropout"])
def test_the_page_of_the_committed_sweeps_is_that_of_their_files(sweep):
    committed = json.loads((ROOT / f"benchmarks/results/compare/sweeps/{sweep}.json").read_text())
    page = (ROOT / "docs/results/ablations.md").read_text()
    assert compare_report.markdown(committed).split(compare_report.EQUAL[:60])[0].strip() in page
    (command,) = re.findall(
        rf"^mosld compare --sweep {sweep}=(\S+) --setting mixture --seeds 3$", page, flags=re.MULTILINE
    )
    assert committed["seeds"] == [0, 1, 2]
    assert [line["row"] for line in committed["rows"]] == [f"mosld-{sweep}{value}" for value in command.split(",")]
    assert {line["setting"] for line in committed["rows"]} == {"mixture"}


def test_the_committed_rates_are_the_best_of_the_committed_sweep():
    folder = ROOT / "benchmarks/results/compare"
    chosen = json.loads((folder / "compare.json").read_text())["settings"]["rows"]
    best: dict = {}
    for own in json.loads((folder / "rates.json").read_text())["rows"]:
        method, _, rate = own["row"].partition("-learning_rate")
        best[method] = max(best.get(method, (0, "")), (own["average"]["mean"], rate))
    assert len(best) == 6
    assert {method: rate for method, (_, rate) in best.items()} == {m: chosen[m]["trainer"][-1] for m in best}


def recorded_cells(monkeypatch, stop_after=None) -> list[str]:
    ran, real = [], compare_module.run_stage

    def one(base, encoder, tasks, stage, *rest):
        if len(ran) == stop_after:
            raise Interrupted
        ran.append(stage.name)
        return real(base, encoder, tasks, stage, *rest)

    monkeypatch.setattr(compare_module, "run_stage", one)
    return ran


def test_a_killed_comparison_goes_on_and_more_methods_and_seeds_join_it(
    data,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
):
    first = recorded_cells(monkeypatch, stop_after=1)
    assert call(data, tmp_path / "o", methods="lora,mosld", seeds=1, setting="mixture") == 130
    assert first == ["lora-seed0"] and "Run the same command again" in capsys.readouterr().err
    monkeypatch.undo()
    rest = recorded_cells(monkeypatch)
    assert call(data, tmp_path / "o", methods="lora,mosld", seeds=1, setting="mixture") == 0
    assert rest == ["mosld-seed0"] and "going on" in capsys.readouterr().out
    assert call(data, tmp_path / "o", methods="mosl,mosld", seeds=2, setting="mixture") == 0
    assert rest == ["mosld-seed0", "mosl-seed0", "mosl-seed1", "mosld-seed1"]
    assert list(told(tmp_path / "o")["settings"]["rows"]) == ["mosl", "mosld"]
    del rest[:]
    assert call(data, tmp_path / "o", methods="lora,mosl,mosld", seeds=1, setting="mixture") == 0 and not rest
    assert call(data, tmp_path / "o", "--learning-rates", "mosl=1e-3", methods="mosl", setting="mixture") == 2
    assert "holds a run with other settings (row mosl)" in capsys.readouterr().err
    assert main(words(data, tmp_path / "o", *FAST)) == 2
    assert "holds a run with other settings (it is one of mosld compare)" in capsys.readouterr().err


def test_a_whole_seed_of_all_methods_comes_before_the_next():
    names = [stage.name for stage in plan_comparison(["a", "b"], ["mixture", "single"], 2, ["x", "y"])]
    assert names[:4] == ["a-seed0", "b-seed0", "a-seed1", "b-seed1"]
    assert names[4:8] == ["a-single-x-seed0", "a-single-y-seed0", "b-single-x-seed0", "b-single-y-seed0"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--methods", "lora,qlora"], "methods must be of mosld, lora, lora_equal, mosl, "),
        (["--methods", "lora,qlora"], "got qlora"),
        (["--methods", "lora,lora"], "methods must differ, got lora,lora"),
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
        (["--sweep", "width=1,2"], "sweep must be rank=..., experts=..., dropout=..., learning_rate=..., with values"),
        (["--sweep", "rank=4,x"], "rank of a sweep must be numbers, got 'x'"),
        (["--sweep", "rank=4,4"], "values of a sweep must differ"),
        (["--sweep", "rank=0"], "r must be an integer of at least 1, got 0"),
        (["--sweep", "learning_rate=0"], "learning rates of a sweep must be positive and finite numbers, got '0'"),
        (["--sweep", "experts=2-4-6"], "experts=2-4-6 has 3 parts of the layers, and the model has 2 layers"),
        (["--sweep", "experts=1-4"], "top_k must be in [1, num_experts=1], got 2"),
        (["--sweep", "experts=4", "--methods", "lora"], "num_experts=4 contradicts method 'lora'"),
        (["--sweep", "rank=4", "--methods", "lora_equal"], "--sweep contradicts lora_equal"),
        (["--learning-rates", "mola=1e-3,x=1"], "learning-rates must be name=rate,... of the methods"),
        (["--learning-rates", "mola=fast"], "learning-rates must be positive and finite numbers, got 'fast'"),
        (["--merge", "soup"], "merge must be of task_arithmetic, ties, adamerging_task, "),
        (["--merge", "ties", "--methods", "mosld"], "lora must be among the methods, got mosld"),
        (["--merge", "ties", "--setting", "mixture"], "which --setting mixture does not train"),
        (["--merge", "ties", "--sweep", "rank=2", "--methods", "lora"], "--merge contradicts --sweep"),
        (["--merge-options", "steps=5"], "--merge-options steps=5 is for --merge, which is not given"),
        (
            ["--merge", "ties", "--merge-options", "size=5", "--methods", "lora"],
            "merge-options must be name=number,... of",
        ),
        (["--merge", "ties", "--merge-options", "steps=0", "--methods", "lora"], "steps must be at least 1, got 0"),
        (["--max_steps", "5"], "--max_steps is set by mosld compare: use --num_train_epochs"),
        (["--validation", "1"], "validation must be a share in (0, 1), got 1"),
        (["--quick"], "--quick is for the embedded tasks and model"),
        (["--target-modules", "no_such_layer"], "no_such_layer"),
        (["--lerning_rate", "1"], "--lerning_rate"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_trained(data, tmp_path, capsys, more, message):  # noqa: F811
    assert main(words(data, tmp_path / "out", *more, command="compare")) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_sweep_makes_a_row_of_each_value(data, tmp_path):  # noqa: F811
    assert call(data, tmp_path / "o", "--sweep", "experts=2-4,4-2", methods="mosld", seeds=1, setting="mixture") == 0
    rows = told(tmp_path / "o")["rows"]
    assert [own["row"] for own in rows] == ["mosld-experts2-4", "mosld-experts4-2"]
    assert "difference" in rows[1] and told(tmp_path / "o")["reference"] == "mosld-experts2-4"
    assert rows[0]["trained_parameters"] == rows[1]["trained_parameters"]


def test_the_equal_lora_takes_part_in_a_sweep_of_rates_which_leaves_its_rank(data, tmp_path):  # noqa: F811
    sweep = ("--sweep", "learning_rate=1e-3,2e-3")
    assert call(data, tmp_path / "o", *sweep, methods="lora_equal", seeds=1, setting="mixture") == 0
    rows = told(tmp_path / "o")["settings"]["rows"]
    assert list(rows) == ["lora_equal-learning_rate1e-3", "lora_equal-learning_rate2e-3"]
    assert [row["trainer"][-1] for row in rows.values()] == ["1e-3", "2e-3"]
    assert len({row["adapter"]["options"]["r"] for row in rows.values()}) == 1


def test_experts_are_given_to_equal_parts_of_the_layers():
    base = tiny_llama(num_hidden_layers=11)
    assert layer_list(base) == ("model.layers", 11)
    config = Adapter("mosld", swept_options("mosld", "experts", "2-4-6", base)).config(1)
    counts = [config.experts_of(f"model.layers.{i}.mlp.0.up_proj") for i in range(11)]
    assert counts == [2] * 4 + [4] * 4 + [6] * 3
    assert count_trained(base, Adapter("mosld", {"num_experts": 4}), 1) > 0 and not hasattr(base, "peft_config")


def test_a_sweep_of_ranks_keeps_the_scale():
    for method, scale in (("lora", 2), ("mosld", 2), ("hydralora", 4)):
        options = swept_options(method, "rank", "3", tiny_llama())
        assert options["r"] == 3 and options["alpha"] == 3 * scale


def test_validation_items_come_from_training_and_no_test_item_is_scored(data, tmp_path):  # noqa: F811
    more = ["--validation", "0.25"]
    assert call(data, tmp_path / "o", *more, methods="lora", seeds=1, setting="mixture") == 0
    assert {name: task["n"] for name, task in told(tmp_path / "o")["tasks"].items()} == {"even": 6, "vowel": 4}


def test_the_quantiles_of_student_are_those_of_the_tables():  # 2.5 by the midpoint rule on 400,000 pieces
    for freedom, quantile in (
        (1, 12.7062),
        (2, 4.30265),
        (2.5, 3.574655),
        (10, 2.22814),
        (120, 1.97993),
        (1e6, 1.95997),
    ):
        assert t_quantile(freedom) == pytest.approx(quantile, rel=2e-5)
    assert t_quantile(1, 0.5) == pytest.approx(1.0, rel=1e-5)


def test_the_interval_is_the_formula():
    values = [numpy.array([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0]]), numpy.array([[0.0, 1.0], [0.0, 0.0]])]
    mean, low, high = interval(values)
    v_seeds = numpy.var([(0.5 + 0.5) / 2, (0.75 + 0.0) / 2], ddof=1) / 2
    v_items = (numpy.var([1, 0.5, 0, 1], ddof=1) / 4 + numpy.var([0, 0.5], ddof=1) / 2) / 4
    freedom = (v_seeds + v_items) ** 2 / (v_seeds**2 / 1 + v_items**2 / 4)
    half = t_quantile(freedom) * math.sqrt(v_seeds + v_items)
    assert (mean, low, high) == pytest.approx((0.4375, 0.4375 - half, 0.4375 + half))
    assert interval([numpy.ones((3, 5))]) == (1, 1, 1)
    one = interval([values[0][:1]])
    assert (one.high - one.low) / 2 == pytest.approx(t_quantile(3) * math.sqrt(numpy.var([1, 0, 0, 1], ddof=1) / 4))


@pytest.mark.parametrize(("seed_std", "item_std"), [(0.05, 0.0), (0.0, 0.3), (0.05, 0.3)])
def test_the_interval_covers_the_truth_as_often_as_it_says(seed_std, item_std):
    """Seeds, items, or both as what varies: of 600 draws of differences with mean 0, at least 93 % hold 0."""
    generator, held = numpy.random.default_rng(0), 0
    for _ in range(600):
        seeds, items = generator.normal(0, seed_std, (3, 1)), generator.normal(0, item_std, (1, 100))
        own = interval(
            [seeds + items[:, half] + generator.normal(0, 0.3, (3, 50)) for half in (slice(50), slice(50, 100))]
        )
        held += own.low <= 0 <= own.high
    assert held / 600 >= 0.93


def test_a_row_is_known_by_its_whole_recipe():
    assert Row("a", "A", Adapter("mosld")) != Row("a", "A", Adapter("mosld", {"r": 4}))


@pytest.mark.slow
def test_merges_of_the_single_loras_stand_in_the_same_table(data, tmp_path, monkeypatch):  # noqa: F811
    merges = (
        "--merge",
        "task_arithmetic,adamerging_task++,concrete_task_arithmetic",
        "--merge-options",
        "steps=2,batch_size=4",
    )
    assert call(data, tmp_path / "o", *merges, methods="lora,mosld", seeds=2) == 0
    names = ["task_arithmetic", "adamerging_task++", "concrete_task_arithmetic"]
    own = {row["row"]: row for row in told(tmp_path / "o")["rows"] if row["setting"] == "merged"}
    assert list(own) == [f"{name}-merged" for name in names]
    single = line(tmp_path / "o", "lora", "single")
    more = [row["trained_parameters"] - single["trained_parameters"] for row in own.values()]
    assert more[:2] == [0, 2] and more[2] > 1000  # coefficients, and a mask
    assert all(row["train_seconds"] > single["train_seconds"] for row in own.values())
    mixture = line(tmp_path / "o", "mosld", "mixture")["average"]["mean"]
    for row in own.values():
        assert row["difference"]["average"]["mean"] == pytest.approx(row["average"]["mean"] - mixture)
    # The cell is what `mosld merge` makes of the same adapters.
    adapters = [str(tmp_path / "o" / "adapters" / f"lora-single-{task}-seed1") for task in ("even", "vowel")]
    tasks = [f"{task}={data / task}.jsonl:{data / task}.jsonl" for task in ("even", "vowel")]
    words_ = ["merge", "--method", "task_arithmetic", "--base", str(data / "model"), *adapters, "--tasks", *tasks]
    assert main([*words_, "--output", str(tmp_path / "merge")]) == 0
    scores = json.loads((tmp_path / "merge" / "results.json").read_text())["tasks"]
    for task in ("even", "vowel"):
        assert own["task_arithmetic-merged"]["accuracy"][task]["per_seed"][1] == scores[task]["accuracy"]
    for method in ("adamerging_task++", "concrete_task_arithmetic"):  # which a seed and its adapters decide
        more = ("--steps", "2", "--batch-size", "4", "--seed", "1", "--output", str(tmp_path / method))
        words_ = ["merge", "--method", method, "--base", str(data / "model"), *adapters, "--tasks", *tasks]
        assert main([*words_, *more]) == 0
        alone = json.loads((tmp_path / method / "results.json").read_text())
        cell = json.loads((tmp_path / "o" / "stages" / f"{method}-merged-seed1.json").read_text())
        assert [loss for _, loss in cell["loss"]] == alone["losses"]
        assert cell["coefficients"] == alone["coefficients"]
    rest = recorded_cells(monkeypatch)
    assert call(data, tmp_path / "o", *merges, methods="lora,mosld", seeds=2) == 0 and not rest
