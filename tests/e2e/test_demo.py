"""The demo model that ships is as good as its card says. The whole check is `python tools/check_demo.py DIR`."""

from __future__ import annotations

import json
import platform
from importlib import resources

import check_demo
import demo_corpus
import pytest

import flashformer


@pytest.fixture(scope="module")
def figures():
    held_out = [f for f in demo_corpus.pinned_files() if f.held_out]
    n_bytes = sum(map(len, demo_corpus.read_files(held_out, strict=False).values()))
    if n_bytes < check_demo.LEAST_HELD_OUT_BYTES:
        pytest.skip(
            f"Python {platform.python_version()} has {n_bytes} bytes of the held-out files: see demo_corpus.txt"
        )
    with flashformer.load("demo") as llm:
        return check_demo.measure(llm, sample=True)


@pytest.mark.parametrize("bar", check_demo.BARS, ids=lambda bar: bar.key)
def test_bar_holds(figures, bar):
    assert bar.holds(figures[bar.key]), f"{bar.key} is {figures[bar.key]}, bar {bar.limit}: {bar.says}"


def test_training_record_names_the_pinned_corpus():
    record = json.loads((resources.files("flashformer") / "demo" / "training.json").read_text())
    assert record["corpus_list_sha256"] == demo_corpus.list_digest()
    assert record["checked"]["samples"] == check_demo.N_SAMPLES
    assert all(bar.holds(record["checked"][bar.key]) for bar in check_demo.BARS)
    # Stored in bf16 and run here, the model knows what it knew in fp32 when training ended.
    drift = record["checked"]["held_out_bits_per_byte"] - record["held_out_bits_per_byte_fp32_weights"]
    assert abs(drift) < 0.02


def test_bars_reject_a_model_that_babbles():
    for bar in check_demo.BARS:
        assert not bar.holds(bar.limit - 0.01 if bar.higher_is_better else bar.limit + 1)


def test_a_model_without_knowledge_has_the_bits_of_its_tokens():
    """Logits that are all alike cost log2(vocabulary) bits per token, whatever the windows."""

    class Uniform:
        class tokenizer:  # noqa: N801
            @staticmethod
            def encode(text, add_special_tokens=True):
                return list(text.encode())

        @staticmethod
        def logits(ids):
            return check_demo.np.zeros((len(ids), 256), "f4")

    assert check_demo.bits_per_byte(Uniform(), ["ab" * 700, "c"]) == pytest.approx(8.0)
