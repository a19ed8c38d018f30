"""Result files into one document: every table with its losing cells, the targets, the machine, and charts beside it."""

import argparse
import json
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..peers.known import FROZEN, OURS
from . import charts, targets

PAGE = Path("docs/results/performance.md")
VERBS = ("layer", "memory", "scaling", "training", "kernels")
MIB = 2**20
# Of a paragraph; rows of tables are as long as they are.
WIDTH = 120
HEAD = """\
# Performance

After this page you know what a layer of MoSLD costs on a CPU beside its peers, losing cells included.

Written by `python -m benchmarks report` from result files that the other verbs wrote; `make bench` does both.
All candidates run once a round, interleaved in one process. Times are medians over the rounds; ratios are medians
of the time over the frozen `nn.Linear`'s, or the frozen model's, in the same round. Machines and settings are in
the files.

| file | processor | threads | torch | commit | copy GB/s, product GFLOP/s |
|---|---|---|---|---|---|"""
LAYERS = """\
## One layer

Times are ratios; `saved` is what forward keeps for backward beside x and parameters; `error` is the median over tokens
of the distance to float64; `over model` is measured over what two measured rates predict; `of limit` is the share
of the least time that any mixture of these sizes needs by the same model.
"""
NO_GPU = """\
## On a GPU

Not measured on a GPU. `python -m benchmarks gpu --out DIR` measures it where there is one."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m benchmarks report`."""
    parser.add_argument("files", nargs="+", type=Path, help="JSON files that the other verbs wrote")
    parser.add_argument("--out", type=Path, default=PAGE, help="the document")


def run(options: argparse.Namespace) -> int:
    """raises ValueError as `load` does, before anything is written."""
    write_page(options.files, options.out)
    return 0


def load(files: Sequence[Path]) -> list[dict]:
    """The result files; raises ValueError, naming the file, for one that is missing, not JSON, or of another form."""
    results = []
    for path in files:
        try:
            result = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as JSON: {error}") from error
        verb = result.get("verb") if isinstance(result, dict) else None
        if not (verb in VERBS or (isinstance(result, dict) and "parts" in result)):
            raise ValueError(f"{path} is no result of {', '.join(VERBS)} or gpu: its verb is {verb!r}")
        results.append({**result, "file": path.name})
    return results


def write_page(files: Sequence[Path], out: Path) -> None:
    """Write the document `out`, and its charts into a folder of the same name beside it.

    raises ValueError as `load` does, before anything is written.
    """
    results = load(files)
    tables = list(_tables(results))
    folder = out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    pictures = charts.draw(tables, folder)
    text = [*_head(results), *_targets(tables)]
    for name, alt in pictures.items():
        text.append(f"![{alt}]({folder.name}/{name})\n")
    sections = {
        "layer": _layers,
        "scaling": _scaling,
        "memory": _memory,
        "training": _training,
        "kernels": _kernels,
    }
    for verb, section in sections.items():
        own = [table for table in tables if table["verb"] == verb]
        if own:
            text += section(own)
    text += _gpu([result for result in results if "parts" in result])
    out.write_text("\n".join(text).rstrip() + "\n")
    print(f"{out}, with {len(pictures)} charts in {folder}")


def _tables(results: Sequence[dict]) -> Iterator[dict]:
    """Every table of every file, with what its file says of all of them."""
    for result in results:
        for table in result.get("tables", ()):
            yield {**table, "verb": result["verb"], "file": result["file"], "rates": result.get("rates", {})}


def _head(results: Sequence[dict]) -> list[str]:
    lines = [HEAD]
    for result in results:
        machine = result["machine"]
        cells = (result["file"], machine["processor"], machine["threads"], machine["torch"], machine["commit"])
        lines.append(f"| {' | '.join(map(str, cells))} | {_rates_in_words(result)} |")
    return [*lines, ""]


def _rates_in_words(result: dict) -> str:
    rates = []
    for name, rate in result.get("rates", {}).items():
        rates.append(f"{name} {rate['copy_bytes'] / 1e9:.1f}, {rate['matmul_flops'] / 1e9:.1f}")
    return "; ".join(rates) or "-"


def _targets(tables: Sequence[dict]) -> list[str]:
    reasons = "Why not, where not: [decisions](../design/decisions.md)."
    return ["## Targets on a CPU", "", *targets.lines(tables), "", reasons, ""]


def _layers(tables: Sequence[dict]) -> list[str]:
    lines = [LAYERS]
    for table in tables:
        lines += layer_table(table)
    return lines


def title(table: dict) -> str:
    s = table["shape"]
    mode = ", eval mode without gradients" if table.get("mode") == "eval" else ""
    sizes = f"{s['T']} tokens, {s['D_in']} → {s['D_out']}, R={s['R']}, E={s['E']}, K={s['K']}"
    return f"{sizes}, {table['dtype']}{mode}"


def layer_table(table: dict) -> list[str]:
    """One table in Markdown, then which peers are faster than MoSLD in it."""
    lines = [f"### {title(table)}", "", f"From `{table['file']}`.", ""]
    if "left_out" in table:
        return [*lines, f"Left out: {table['left_out']}.", ""]
    step = "forward" if table.get("mode") == "eval" else "both"
    by_peer: dict[str, dict[str, dict]] = {}
    for row in table["rows"]:
        if "step" in row:
            by_peer.setdefault(row["name"], {})[row["step"]] = row
    frozen_ms = by_peer[FROZEN][step]["median_ms"]
    lines += [
        f"Frozen layer: {frozen_ms:.2f} ms.",
        "",
        "| | forward | backward | both | 20 to 80 % | saved MiB | error | over model | of limit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, steps in by_peer.items():
        if step in steps:
            lines.append(_layer_row(name, steps, step, frozen_ms))
    return [*lines, "", *_failures(table), *_lost(table, step), ""]


def _layer_row(name: str, steps: dict[str, dict], step: str, frozen_ms: float) -> str:
    row = steps[step]
    cells = [f"**{name}**" if name == OURS else name]
    for each in ("forward", "backward", "both"):
        cells.append(f"{steps[each]['ratio']:.2f}" if each in steps else "-")
    cells += [
        f"{row['low_ms'] / frozen_ms:.2f} to {row['high_ms'] / frozen_ms:.2f}",
        f"{row['saved_bytes'] / MIB:.2f}" if "saved_bytes" in row else "-",
        f"{row['error']:.1e}" if "error" in row else "-",
        f"{row['over_model']:.2f}" if "over_model" in row else "-",
        f"{100 * row['of_limit']:.0f} %" if "of_limit" in row else "-",
    ]
    return f"| {' | '.join(cells)} |"


def headline(tables: Sequence[dict]) -> list[str]:
    """One line a table of `layer.json`, the ratios of forward + backward: what the README shows."""
    peers = names(tables[0])
    peers.remove(FROZEN)
    lines = [f"| tokens, layer, rank | | {' | '.join(peers)} |", "|---|---|" + "---|" * len(peers)]
    for table in tables:
        both = _ratios(table, "both")
        both.pop(FROZEN, None)
        best = min(both.values(), default=None)
        cells = []
        for name in peers:
            cell = f"{both[name]:.2f}" if name in both else "-"
            cells.append(f"**{cell}**" if name in both and both[name] == best else cell)
        s = table["shape"]
        sizes = f"{s['T']:,}, {s['D_in']} → {s['D_out']}, {s['R']}"
        lines.append(f"| {sizes} | {table['dtype']} | {' | '.join(cells)} |")
    return lines


def names(table: dict) -> list[str]:
    """The peers of a table in their order."""
    return list(dict.fromkeys(row["name"] for row in table["rows"]))


def _ratios(table: dict, step: str) -> dict[str, float]:
    """Peer -> its ratio over the frozen layer."""
    return {row["name"]: row["ratio"] for row in table.get("rows", ()) if row.get("step") == step}


def _failures(table: dict) -> list[str]:
    failed = []
    for row in table["rows"]:
        if "failure" in row:
            failed.append(f"{row['name']} ({row['failure']})")
    return [_wrapped(f"Not run: {'; '.join(failed)}."), ""] if failed else []


def _lost(table: dict, step: str) -> list[str]:
    """The losing cells, by name."""
    times = _ratios(table, step)
    if OURS not in times:
        return []
    faster = []
    for name, time in times.items():
        if name != FROZEN and time < times[OURS]:
            faster.append(f"{name} ({time:.2f})")
    return [_wrapped(f"Faster than MoSLD ({times[OURS]:.2f}): {', '.join(faster) or 'none of them'}.")]


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def _scaling(tables: Sequence[dict]) -> list[str]:
    lines = ["## How cost grows", ""]
    by_sweep: dict[str, list[dict]] = {}
    for table in tables:
        by_sweep.setdefault(table["swept"], []).append(table)
    for swept, own in by_sweep.items():
        lines += _sweep(swept, own)
    return lines


def _sweep(swept: str, tables: Sequence[dict]) -> list[str]:
    everyone: dict[str, None] = {}
    for table in tables:
        if "rows" in table:
            everyone.update(dict.fromkeys(names(table)))
    peers = list(everyone)[1:]  # the frozen layer comes first
    fixed = ", ".join(f"{key}={value}" for key, value in tables[-1]["shape"].items() if key != swept)
    lines = [
        f"### By {swept}",
        "",
        f"Ratios over the frozen layer, forward + backward; {fixed} (K at most E).",
        "",
        f"| {swept} | frozen ms | {' | '.join(peers)} |",
        "|---|---|" + "---|" * len(peers),
    ]
    for table in tables:
        if "left_out" in table:
            lines.append(f"| {table['value']} | {table['left_out']} |" + " |" * len(peers))
            continue
        both = {row["name"]: row for row in table["rows"] if row.get("step") == "both"}
        cells = [str(table["value"]), f"{both[FROZEN]['median_ms']:.2f}"]
        for name in peers:
            cells.append(f"{both[name]['ratio']:.2f}" if name in both else "failed")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _memory(tables: Sequence[dict]) -> list[str]:
    lines = ["## Memory kept for backward", "", "Beside x and the parameters, each storage once.", ""]
    for table in tables:
        lines += [f"### {title(table)}", "", "| | saved MiB | trained parameters |", "|---|---|---|"]
        for row in table["rows"]:
            if "saved_bytes" in row:
                lines.append(f"| {row['name']} | {row['saved_bytes'] / MIB:.2f} | {row['parameters']:,} |")
        lines += ["", *_failures(table)]
    return lines


def _training(tables: Sequence[dict]) -> list[str]:
    lines = ["## A small LLaMA, end to end", ""]
    for table in tables:
        m = table["model"]
        which = "all seven linears" if table["targets"] == "all" else "q and v"
        if table["kind"] == "training":
            what, step = "training step, forward + backward", "both"
        else:
            what, step = "generation, one token at a time", "token"
        size = f"{m['parameters']:,} parameters, {m['layers']} blocks of {m['hidden']}"
        lines += [
            f"### {which} of every block adapted: {what}",
            "",
            f"{size}; {m['batch']} sequences of {m['length']} tokens in training; {table['dtype']}.",
            "",
            "| | ms | over frozen | tokens per s | saved MiB |",
            "|---|---|---|---|---|",
        ]
        for row in table["rows"]:
            if row.get("step") == step:
                saved = f"{row['saved_bytes'] / MIB:.1f}" if "saved_bytes" in row else "-"
                numbers = f"{row['median_ms']:.2f} | {row['ratio']:.2f} | {row['tokens_per_s']:.0f} | {saved}"
                lines.append(f"| {row['name']} | {numbers} |")
        lines += ["", *_failures(table), *_lost(table, step), ""]
    return lines


def _kernels(tables: Sequence[dict]) -> list[str]:
    lines = ["## The operator's steps", "", "`share` is of the frozen layer's forward + backward.", ""]
    for table in tables:
        lines += [f"### {title(table)}", ""]
        if "left_out" in table:
            lines += [f"Left out: {table['left_out']}.", ""]
            continue
        lines += ["| | | ms | share | model ms | over model |", "|---|---|---|---|---|---|"]
        for row in table["rows"]:
            measured = f"{row['median_ms']:.3f} | {100 * row['share']:.1f} %"
            modelled = f"{row['model_ms']:.3f} | {row['over_model']:.1f}"
            lines.append(f"| {row['direction']} | {row['name'].strip()} | {measured} | {modelled} |")
        lines.append("")
    return lines


def _gpu(results: Sequence[dict]) -> list[str]:
    if not results:
        return [NO_GPU]
    lines = ["## On a GPU", ""]
    for result in results:
        lines += [f"{result['machine'].get('gpu', 'GPU')}, commit {result['machine']['commit']}.", ""]
        lines += ["| layer | | way | over frozen |", "|---|---|---|---|"]
        for part in result["parts"]:
            for row in part.get("rows", ()):
                if part["name"].startswith("layer") and row.get("step") == "both" and "ratio" in row:
                    lines.append(f"| {part['name']} | {row['name']} | {row['way']} | {row['ratio']:.2f} |")
        lines.append("")
    return lines
