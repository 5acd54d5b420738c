"""Requests that share forwards get what they get alone, to the bit, whoever comes, leaves or is cached meanwhile."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import pytest
from folders import model_folder

import flashformer as ff

SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.8, "seed": 4, "top_k": 20, "top_p": 0.9},
    {"temperature": 1.0, "seed": 5, "repeat_penalty": 1.3, "logit_bias": {9: 2.0}},
    {"temperature": 0.0, "logprobs": 4},
]
PROMPTS = [[5], [5, 6, 7, 8], [5, 6, 7, 9, *range(30, 60)], [40] * 70]
N_THREADS, N_SLOTS = 6, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


def answer(llm: ff.LLM, i: int) -> tuple[list[int], list[object]]:
    """Of request i, of which there are as many as pairs of prompt and settings."""
    settings = SETTINGS[i % len(SETTINGS)]
    output = llm.generate(PROMPTS[i // len(SETTINGS)], max_tokens=12, ignore_eos=True, **settings)
    return output.token_ids, list(output.logprobs or [])


@pytest.mark.parametrize(
    ("options", "n"),
    [
        ({"dtype": "bf16"}, 60),
        ({"dtype": "f32", "prompt_chunk": 7}, 60),
        ({"quant": "int4-g32"}, 60),
        pytest.param({"dtype": "bf16"}, 1000, marks=pytest.mark.long),
        pytest.param({"quant": "int8"}, 1000, marks=pytest.mark.long),
    ],
)
def test_b38_requests_together_get_what_each_gets_alone(folder: Path, options: dict[str, Any], n: int) -> None:
    n_kinds = len(PROMPTS) * len(SETTINGS)
    with ff.load(folder, device="cpu", threads=2, streams=1, **options) as llm:
        alone = [answer(llm, i) for i in range(n_kinds)]
    differing: list[int] = []
    all_there = threading.Barrier(N_SLOTS)

    def ask(llm: ff.LLM, seed: int) -> None:
        draw = random.Random(seed)
        if seed < N_SLOTS:  # forwards of all slots, however fast this machine is
            with llm.stream(PROMPTS[0], max_tokens=30, ignore_eos=True) as stream:
                next(stream)
                all_there.wait(60)
                for _ in stream:
                    pass
        for _ in range(n // N_THREADS):
            i = draw.randrange(n_kinds)
            if draw.random() < 0.3:  # a neighbour that leaves early
                with llm.stream(PROMPTS[draw.randrange(len(PROMPTS))], max_tokens=30, ignore_eos=True) as stream:
                    for _ in range(draw.randrange(4)):
                        next(stream)
            if draw.random() < 0.1:
                llm.warm(PROMPTS[draw.randrange(len(PROMPTS))])
            if answer(llm, i) != alone[i]:
                differing.append(i)

    with ff.load(folder, device="cpu", threads=2, streams=N_SLOTS, **options) as llm:
        forward, most = llm.kernel.forward, [0]

        def watched(n_rows: int, again: tuple[int, ...] | None = None) -> None:
            most[0] = max(most[0], len(set(llm.kernel.rows.slot[:n_rows].tolist())))
            forward(n_rows, again)

        llm.kernel.forward = watched  # type: ignore[method-assign]
        threads = [threading.Thread(target=ask, args=(llm, seed)) for seed in range(N_THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert differing == []
    assert most[0] == N_SLOTS
