"""Fills the figures of README.md, docs/figures.md and the demo's model card from recorded results; `--check` compares.

Each file has its tables between the two marker lines below. No figure in them is typed by hand.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DEMO = ROOT / "src" / "flashformer" / "demo"
BEGIN = "<!-- figures: written by tools/figures.py, begin -->"
END = "<!-- figures: end -->"
NO_FIGURES = "No figures are recorded yet."

Record = dict[str, Any]


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(header), *([str(cell) for cell in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(record: Record) -> str:
    """What was measured on, in a phrase: one table is of one machine."""
    return f"{record['machine']['cpu']}, {record['machine']['isa']}, {record['threads']} threads"


def latest(records: Iterable[Record]) -> list[Record]:
    """The last record of every measurement, in the order in which the measurements first appear."""
    keys = ("model", "quant", "device", "test", "rows", "depth")
    return list({(machine(record), *(record[key] for key in keys)): record for record in records}.values())


def every(*_: Record) -> bool:
    return True


def benchmark_figures(results: Path = RESULTS, shown_if: Callable[[Record], bool] = every) -> str:
    """The newest record of every measurement of `flashformer bench`, a table for every machine."""
    lines = [line for path in sorted(results.glob("*.jsonl")) for line in path.read_text().splitlines()]
    records = latest(record for record in map(json.loads, lines) if "device" in record)  # others are of other kinds
    order = ("model", "quant", "test", "rows", "depth")
    records = sorted(filter(shown_if, records), key=lambda r: [(r[k] != "none", r[k]) for k in order])
    if not records:
        return NO_FIGURES

    def shown(value: float | None, digits: int, unit: str = "") -> str:
        return "" if value is None else f"{value:.{digits}f}{unit}"

    def row(r: dict[str, Any]) -> list[object]:
        test = f"{r['test']}, {r['rows']} rows" if r["rows"] != 1 else r["test"]
        percent = None if r.get("fraction") is None else 100 * r["fraction"]
        speed = [shown(r["tokens_per_s"], 1), shown(r.get("gb_per_s"), 1), shown(r.get("probe_gb_per_s"), 1)]
        in_cache = r["weight_bytes"] < 4 * r["machine"]["llc_bytes"]  # then memory bandwidth is no measure
        share = "" if r["test"] == "prefill" else "weights fit in cache" if in_cache else shown(percent, 0, " %")
        weights = "as stored" if r["quant"] == "none" else r["quant"]
        return [r["model"], weights, test, r["depth"], *speed, share, r["commit"]]

    header = ("model", "weights", "test", "context", "tokens/s", "GB/s", "measured read GB/s", "of measured", "commit")
    tables = []
    for name in sorted(set(map(machine, records))):
        rows = [row(r) for r in records if machine(r) == name]
        tables.append("\n".join([table(header, rows), "", f"Measured on: {name}."]))
    return "\n\n".join(tables)


def latest_pairs(results: Path = RESULTS) -> list[tuple[Record, Record]]:
    """(record, matched pair) of engines.jsonl, the newest of every model, format, test, of our weights and the peer, in
    the order in which they first appear: not every run has all peers.
    """
    path = results / "engines.jsonl"
    records = map(json.loads, path.read_text().splitlines() if path.exists() else [])
    keys = ("model", "format", "test", "depth")
    pairs = ((record, pair) for record in records for pair in record["pairs"] if pair["matched"])
    newest = {
        (machine(record), *(record[key] for key in keys), weights(record, pair), pair["peer"]): (record, pair)
        for record, pair in pairs
    }
    return list(newest.values())


def weights(record: Record, pair: Record) -> str:
    """Ours, whatever the cache beside them."""
    return str(record["engines"][pair["ours"]]["weights"])


def engine_figures(results: Path = RESULTS, shown_if: Callable[[Record, Record], bool] = every) -> str:
    """Every matched pair of `benchmarks/compare_engines.py`, a table for every machine; empty if none is recorded."""
    pairs = [(record, pair) for record, pair in latest_pairs(results) if shown_if(record, pair)]
    names = sorted({machine(record) for record, _ in pairs})
    return "\n\n".join(pairs_table(name, [both for both in pairs if machine(both[0]) == name]) for name in names)


def pairs_table(name: str, pairs: Iterable[tuple[Record, Record]]) -> str:
    rows, versions = [], set()
    for record, pair in pairs:
        prompt = record["test"] == "prefill"
        test = f"prompt of {record['tokens']}" if prompt else f"decode, {record['depth']} cached"
        ours, theirs = (record["engines"][pair[side]] for side in ("ours", "theirs"))
        speeds = [
            cell
            for e in (ours, theirs)
            for cell in (f"{e['tokens_per_s']['median']:.1f}", "" if prompt else f"{e['gb_per_s']:.1f}")
        ]
        ratio = pair["times_as_fast"]
        fast = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
        about = [fast, f"{pair['bytes_per_token']:.3f}", record["rounds"], record["commit"]]
        rows.append([record["model"], test, ours["weights"], *speeds[:2], pair["theirs"], *speeds[2:], *about])
        versions.add(f"{pair['peer']} {theirs['version']}")
    header = ["model", "test", "weights", "tokens/s", "GB/s", "beside", "tokens/s", "GB/s"]
    header += ["times as fast (min to max)", "bytes per token, ours / theirs", "rounds", "commit"]
    note = f"Engines taking turns, pairs within a round, with {'; '.join(sorted(versions))}; on {name}."
    return "\n".join([table(header, rows), "", note])


def all_figures(results: Path = RESULTS) -> str:
    return "\n\n".join(filter(None, [benchmark_figures(results), engine_figures(results)]))


def readme_figures(results: Path = RESULTS) -> str:
    """Decoding one row beside memory, and beside one peer."""
    ours = benchmark_figures(results, lambda r: (r["test"], r["rows"]) == ("decode", 1) and r["depth"] in (32, 1024))
    return "\n\n".join(filter(None, [ours, engine_figures(results, lambda _, pair: pair["peer"] == "llama.cpp")]))


def demo_figures(folder: Path = DEMO) -> str:
    path = folder / "training.json"
    if not path.exists():
        return NO_FIGURES
    record = json.loads(path.read_text())
    rows: list[tuple[str, str]] = [
        ("training text", f"{record['training_text_bytes'] / 1e6:.1f} MB"),
        ("SHA-256 of the list of files", f"`{record['corpus_list_sha256']}`"),
        ("tokens seen in training", f"{record['training_tokens'] / 1e6:.1f} M"),
        ("time on two CPU cores", f"{record['training_minutes']:.0f} minutes"),
        ("seed", str(record["seed"])),
        ("bits per byte of held-out text, fp32 weights", f"{record['held_out_bits_per_byte_fp32_weights']:.3f}"),
    ]
    checked = record.get("checked")
    if checked:
        rows += [
            ("the same, as shipped, through this engine", f"{checked['held_out_bits_per_byte']:.3f}"),
            ("held-out text", f"{checked['held_out_bytes'] / 1e3:.0f} KB"),
            ("samples that parse", f"{100 * checked['share_parsing']:.0f} % of {checked['samples']}"),
            ("samples indented consistently", f"{100 * checked['share_indented']:.0f} % of {checked['samples']}"),
            ("greedy runs that end in a loop", f"{checked['greedy_loops']} of 20"),
            ("longest copy of training text in a sample", f"{checked['longest_copy_characters']} characters"),
        ]
    return table(("figure", "value"), rows)


FILES: dict[Path, Callable[[], str]] = {
    ROOT / "README.md": readme_figures,
    ROOT / "docs" / "figures.md": all_figures,
    DEMO / "README.md": demo_figures,
}


def filled(text: str, figures: str) -> str:
    before, found, rest = text.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not found or not closed or BEGIN in after:
        raise SystemExit(f"the markers {BEGIN} and {END} must stand once each, in this order")
    return f"{before}{BEGIN}\n{figures}\n{END}{after}"


def main() -> None:
    if sys.argv[1:] not in ([], ["--check"]):
        raise SystemExit(__doc__)
    for path, figures in FILES.items():
        text = path.read_text()
        new = filled(text, figures())
        if new == text:
            continue
        if sys.argv[1:]:
            raise SystemExit(
                f"{path.relative_to(ROOT)} does not show the recorded figures: run python tools/figures.py"
            )
        path.write_text(new)


if __name__ == "__main__":
    main()
