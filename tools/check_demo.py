"""Judges the demo model by what it knows and what it writes, through this package's own engine.

    python tools/check_demo.py MODEL_DIR [--sample] [--record]

Prints each figure beside its bar and exits 1 when one fails. All held-out text is scored and all training text
searched for copies, which takes minutes; --sample, for CI, compares excerpts of the one with what the record says of
them and searches a fifth of the other. --record also writes the figures into MODEL_DIR/training.json, from which the
model card is filled.

Held-out text is read from the running Python's standard library. The whole check needs all pinned files; --sample
leaves out those that differ, and with fewer than 12 left there is no verdict (exit 2).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import demo_corpus
import numpy as np
from demo_judges import indents_consistently, longest_copy, loops, parses

import flashformer
from flashformer.engine import LLM

BOS = 0
WINDOW = 512  # tokens that one window of held-out text predicts
LEAST_HELD_OUT_FILES = 12
N_SAMPLES = 200
MAX_TOKENS = 128
TEMPERATURE = 0.7
SAMPLE_PROMPTS = ("def ", "class ", "import ", "    for ")
GREEDY_PROMPTS = (
    "def ", "class ", "import ", "from ", "    for ", "    if ", "    while ", "    return ", "    try:\n", "    with ",
    "def __init__(self", "def main(", "def test_", "class Test", "if __name__ == ", "import os\nimport ", "    raise ",
    "    def read(", "    self.assertEqual(", "_cache = ",
)  # fmt: skip


@dataclass(frozen=True)
class Bar:
    """`key` of a figure, the worst value that passes, and which way is better."""

    key: str
    limit: float
    higher_is_better: bool
    says: str

    def holds(self, value: float) -> bool:
        return value >= self.limit if self.higher_is_better else value <= self.limit


# The bits per byte of the full run, plus 3 percent, and the same of excerpts of whatever files are found.
BARS = (
    Bar("held_out_bits_per_byte", 1.008, False, "bits per byte of held-out standard library source"),
    Bar("held_out_bits_of_record", 1.03, False, "bits of excerpts of held-out files over those on record"),
    Bar("share_parsing", 0.50, True, "samples that are Python once an unfinished last statement is cut"),
    Bar("share_indented", 0.90, True, "samples whose indentation is consistent"),
    Bar("greedy_loops", 4, False, "of 20 greedy runs, those that end in a loop"),
)


def bits(llm: LLM, text: str) -> float:
    """Of all tokens, in windows of WINDOW behind a BOS each, as the training measures it."""
    total = 0.0
    ids = llm.tokenizer.encode(text, add_special_tokens=False)
    for begin in range(0, len(ids), WINDOW):
        targets = ids[begin : begin + WINDOW]
        logits = llm.logits([BOS, *targets[:-1]]).astype(np.float64)  # (len(targets), vocab_size)
        logits -= logits.max(-1, keepdims=True)
        log_total = np.log(np.exp(logits).sum(-1))
        total += float((log_total - logits[np.arange(len(targets)), targets]).sum()) / math.log(2)
    return total


def excerpt_bits(llm: LLM, texts: dict[demo_corpus.File, str]) -> dict[str, float]:
    """By path: bits of about 1 KB from the middle, from the beginning of a line."""
    begins = {file.path: text.find("\n", len(text) // 2) + 1 for file, text in texts.items()}
    return {file.path: round(bits(llm, text[begins[file.path] :][:1024]), 1) for file, text in texts.items()}


def held_out_figures(llm: LLM, texts: dict[demo_corpus.File, str], on_record: dict[str, float]) -> dict[str, Any]:
    """Of all held-out files, or, where there is a record, of excerpts of some."""
    found = excerpt_bits(llm, texts)
    if on_record:
        return {
            "held_out_files": len(found),
            "held_out_bits_of_record": round(sum(found.values()) / sum(on_record[path] for path in found), 4),
        }
    n_bytes = sum(map(len, texts.values()))
    return {
        "held_out_bytes": n_bytes,
        "held_out_bits_per_byte": round(sum(bits(llm, text) for text in texts.values()) / n_bytes, 4),
        "excerpt_bits": found,
    }


def write_samples(llm: LLM, n: int) -> list[tuple[str, str]]:
    """n (prompt, completion) pairs; sample i has seed i."""
    prompts = [SAMPLE_PROMPTS[i % len(SAMPLE_PROMPTS)] for i in range(n)]
    return [
        (p, llm.generate(p, max_tokens=MAX_TOKENS, temperature=TEMPERATURE, seed=i).text) for i, p in enumerate(prompts)
    ]


def share(samples: list[tuple[str, str]], judge: Callable[[str, str], bool]) -> float:
    return sum(judge(p, c) for p, c in samples) / len(samples)


def measure(llm: LLM, on_record: dict[str, float]) -> dict[str, Any]:
    """All figures; a sample of them where the bits of excerpts are on record. Raises SystemExit(2) where too little
    held-out text is found.
    """
    files = demo_corpus.pinned_files()
    held_out = [f for f in files if f.held_out]
    texts = demo_corpus.read_files(held_out, strict=False)
    needed = LEAST_HELD_OUT_FILES if on_record else len(held_out)
    if len(texts) < needed:
        print(
            f"held-out text: {len(texts)} files under {demo_corpus.stdlib()} match {demo_corpus.LIST.name}, "
            f"{needed} are needed: run this with the Python named in the first line of that list",
            file=sys.stderr,
        )
        raise SystemExit(2)
    samples = write_samples(llm, N_SAMPLES)
    greedy = [llm.generate(p, max_tokens=MAX_TOKENS, temperature=0.0).token_ids for p in GREEDY_PROMPTS]
    training = demo_corpus.read_files([f for f in files if not f.held_out], strict=False)
    searched = list(training.values())[:: 5 if on_record else 1]
    copy = longest_copy([completion for _, completion in samples], searched)
    return {
        **held_out_figures(llm, texts, on_record),
        "samples": len(samples),
        "share_parsing": round(share(samples, parses), 3),
        "share_indented": round(share(samples, indents_consistently), 3),
        "greedy_loops": sum(loops(ids) for ids in greedy),
        "longest_copy_characters": len(copy),
        "longest_copy": copy,
        "training_text_searched_bytes": sum(map(len, searched)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--sample", action="store_true")
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    path = args.model / "training.json"
    record = json.loads(path.read_text())
    with flashformer.load(str(args.model)) as llm:
        figures = measure(llm, record["checked"]["excerpt_bits"] if args.sample else {})
    bars = {bar.key: bar for bar in BARS if bar.key in figures}
    failed = [key for key, bar in bars.items() if not bar.holds(figures[key])]
    for key, value in figures.items():
        verdict = "" if key not in bars else "FAILED" if key in failed else "ok"
        bar = f": bar {bars[key].limit:g}, {bars[key].says}" if verdict else ""
        print(f"{key:30} {value!r:12} {verdict}{bar}".rstrip())
    if args.record:
        record["checked_sample" if args.sample else "checked"] = figures
        path.write_text(json.dumps(record, indent=2) + "\n")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
