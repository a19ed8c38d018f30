"""Result files into one document: every table with its losing cells, the targets, the machine, and charts beside it."""

import json
from collections.abc import Sequence
from pathlib import Path

from ..peers.known import FROZEN, OURS
from . import charts, targets

VERBS = ("layer", "memory", "scaling", "training", "kernels")
MIB = 2**20


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


def run(files: Sequence[Path], out: Path) -> None:
    """Write the document `out`, and its charts into a folder of the same name beside it.

    raises ValueError as `load` does, before anything is written.
    """
    results = load(files)
    tables = [
        {**table, "verb": result["verb"], "file": result["file"], "rates": result.get("rates", {})}
        for result in results
        for table in result.get("tables", ())
    ]
    folder = out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    pictures = charts.draw(tables, folder)
    text = ["# Performance", "", *_head(results), *_targets(tables)]
    text += [f"![{alt}]({folder.name}/{name})\n" for name, alt in pictures.items()]
    for verb, section in (
        ("layer", _layers),
        ("scaling", _scaling),
        ("memory", _memory),
        ("training", _training),
        ("kernels", _kernels),
    ):
        own = [table for table in tables if table["verb"] == verb]
        text += section(own) if own else []
    text += _gpu([result for result in results if "parts" in result])
    out.write_text("\n".join(text).rstrip() + "\n")
    print(f"{out}, with {len(pictures)} charts in {folder}")


def _head(results: Sequence[dict]) -> list[str]:
    lines = [
        "Written by `python -m benchmarks report` from result files that the other verbs wrote; `make bench` does both.",
        "All candidates run once a round, interleaved in one process. Times are medians over the rounds; ratios are medians of",
        "the time over the frozen `nn.Linear`'s, or the frozen model's, in the same round. Machines and settings are in the files.",
        "",
        "| file | processor | threads | torch | commit | copy GB/s, product GFLOP/s |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        machine = result["machine"]
        rates = [
            f"{name} {rate['copy_bytes'] / 1e9:.1f}, {rate['matmul_flops'] / 1e9:.1f}"
            for name, rate in result.get("rates", {}).items()
        ]
        cells = (result["file"], machine["processor"], machine["threads"], machine["torch"], machine["commit"])
        lines.append(f"| {' | '.join(map(str, cells))} | {'; '.join(rates) or '-'} |")
    return [*lines, ""]


def _targets(tables: Sequence[dict]) -> list[str]:
    return ["## Targets on a CPU", "", *targets.lines(tables), "", "Why not, where not: [decisions](decisions.md).", ""]


def _layers(tables: Sequence[dict]) -> list[str]:
    lines = [
        "## One layer",
        "",
        "Times are ratios; `saved` is what forward keeps for backward beside x and parameters; `error` is the median over tokens",
        "of the distance to float64; `over model` is measured over what two measured rates predict; `of limit` is the share",
        "of the least time that any mixture of these sizes needs by the same model.",
        "",
    ]
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
    rows = {name: {r["step"]: r for r in table["rows"] if r["name"] == name and "step" in r} for name in names(table)}
    frozen = rows[FROZEN][step]["median_ms"]
    lines += [f"Frozen layer: {frozen:.2f} ms.", ""]
    lines += ["| | forward | backward | both | 20 to 80 % | saved MiB | error | over model | of limit |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for name, steps in rows.items():
        if step not in steps:
            continue
        row = steps[step]
        ratios = [f"{steps[s]['ratio']:.2f}" if s in steps else "-" for s in ("forward", "backward", "both")]
        spread = f"{row['low_ms'] / frozen:.2f} to {row['high_ms'] / frozen:.2f}"
        saved = f"{row['saved_bytes'] / MIB:.2f}" if "saved_bytes" in row else "-"
        error = f"{row['error']:.1e}" if "error" in row else "-"
        model = f"{row['over_model']:.2f}" if "over_model" in row else "-"
        share = f"{100 * row['of_limit']:.0f} %" if "of_limit" in row else "-"
        bold = "**" if name == OURS else ""
        lines.append(
            f"| {bold}{name}{bold} | {' | '.join(ratios)} | {spread} | {saved} | {error} | {model} | {share} |"
        )
    return [*lines, "", *_failures(table), *_lost(table, step), ""]


def headline(tables: Sequence[dict]) -> list[str]:
    """One line a table of `layer.json`, the ratios of forward + backward: what the README shows."""
    peers = [name for name in names(tables[0]) if name != FROZEN]
    lines = [f"| tokens, layer, rank | | {' | '.join(peers)} |", "|---|---|" + "---|" * len(peers)]
    for table in tables:
        s = table["shape"]
        both = {row["name"]: row["ratio"] for row in table.get("rows", ()) if row.get("step") == "both"}
        cells = [f"{both[name]:.2f}" if name in both else "-" for name in peers]
        best = min(both.get(name, float("inf")) for name in peers)
        cells = [f"**{c}**" if both.get(name) == best else c for name, c in zip(peers, cells, strict=True)]
        sizes = f"{s['T']:,}, {s['D_in']} → {s['D_out']}, {s['R']}"
        lines.append(f"| {sizes} | {table['dtype']} | {' | '.join(cells)} |")
    return lines


def names(table: dict) -> list[str]:
    """The peers of a table in their order."""
    return list(dict.fromkeys(row["name"] for row in table["rows"]))


def _failures(table: dict) -> list[str]:
    failed = [f"{row['name']} ({row['failure']})" for row in table["rows"] if "failure" in row]
    return [f"Not run: {'; '.join(failed)}.", ""] if failed else []


def _lost(table: dict, step: str) -> list[str]:
    """The losing cells, by name."""
    times = {row["name"]: row["ratio"] for row in table["rows"] if row.get("step") == step}
    if OURS not in times:
        return []
    faster = [f"{name} ({t:.2f})" for name, t in times.items() if name != FROZEN and t < times[OURS]]
    return [f"Faster than MoSLD ({times[OURS]:.2f}): {', '.join(faster) or 'none of them'}."]


def _scaling(tables: Sequence[dict]) -> list[str]:
    lines = ["## How cost grows", ""]
    for swept in dict.fromkeys(table["swept"] for table in tables):
        own = [table for table in tables if table["swept"] == swept]
        peers = list(dict.fromkeys(name for table in own if "rows" in table for name in names(table)))
        s = {key: value for key, value in own[-1]["shape"].items() if key != swept}
        fixed = ", ".join(f"{key}={value}" for key, value in s.items())
        lines += [
            f"### By {swept}",
            "",
            f"Ratios over the frozen layer, forward + backward; {fixed} (K at most E).",
            "",
        ]
        lines += [f"| {swept} | frozen ms | {' | '.join(peers[1:])} |", "|---|" + "---|" * len(peers)]
        for table in own:
            if "left_out" in table:
                lines.append(f"| {table['value']} | {table['left_out']} |" + " |" * (len(peers) - 1))
                continue
            both = {row["name"]: row for row in table["rows"] if row.get("step") == "both"}
            cells = [f"{both[name]['ratio']:.2f}" if name in both else "failed" for name in peers[1:]]
            lines.append(f"| {table['value']} | {both[FROZEN]['median_ms']:.2f} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def _memory(tables: Sequence[dict]) -> list[str]:
    lines = ["## Memory kept for backward", "", "Beside x and the parameters, each storage once.", ""]
    for table in tables:
        lines += [f"### {title(table)}", "", "| | saved MiB | trained parameters |", "|---|---|---|"]
        kept = [row for row in table["rows"] if "saved_bytes" in row]
        lines += [f"| {row['name']} | {row['saved_bytes'] / MIB:.2f} | {row['parameters']:,} |" for row in kept]
        lines += ["", *_failures(table)]
    return lines


def _training(tables: Sequence[dict]) -> list[str]:
    lines = ["## A small LLaMA, end to end", ""]
    for table in tables:
        m = table["model"]
        which = "all seven linears" if table["targets"] == "all" else "q and v"
        what = "training step, forward + backward" if table["kind"] == "training" else "generation, one token at a time"
        lines += [f"### {which} of every block adapted: {what}", ""]
        size = f"{m['parameters']:,} parameters, {m['layers']} blocks of {m['hidden']}"
        lines += [f"{size}; {m['batch']} sequences of {m['length']} tokens in training; {table['dtype']}.", ""]
        lines += ["| | ms | over frozen | tokens per s | saved MiB |", "|---|---|---|---|---|"]
        step = "both" if table["kind"] == "training" else "token"
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
            numbers = (
                f"{row['median_ms']:.3f} | {100 * row['share']:.1f} % | {row['model_ms']:.3f} | {row['over_model']:.1f}"
            )
            lines.append(f"| {row['direction']} | {row['name'].strip()} | {numbers} |")
        lines.append("")
    return lines


def _gpu(results: Sequence[dict]) -> list[str]:
    if not results:
        return [
            "## On a GPU",
            "",
            "Not measured on a GPU. `python -m benchmarks gpu --out DIR` measures it where there is one.",
        ]
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
