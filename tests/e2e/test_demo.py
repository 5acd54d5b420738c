"""The demo model that ships is as good as its card says. The whole check is `python tools/check_demo.py DIR`."""

from __future__ import annotations

import json
import platform
from importlib import resources

import check_demo
import demo_corpus
import pytest

import flashformer

RECORD = json.loads((resources.files("flashformer") / "demo" / "training.json").read_text())
SAMPLED = [bar for bar in check_demo.BARS if bar.key != "held_out_bits_per_byte"]


@pytest.fixture(scope="module")
def figures():
    held_out = [f for f in demo_corpus.pinned_files() if f.held_out]
    n_found = len(demo_corpus.read_files(held_out, strict=False))
    if n_found < check_demo.LEAST_HELD_OUT_FILES:
        pytest.skip(f"Python {platform.python_version()} has {n_found} of the held-out files: see demo_corpus.txt")
    with flashformer.load("demo") as llm:
        return check_demo.measure(llm, RECORD["checked"]["excerpt_bits"])


@pytest.mark.parametrize("bar", SAMPLED, ids=lambda bar: bar.key)
def test_bar_holds(figures, bar):
    assert bar.holds(figures[bar.key]), f"{bar.key} is {figures[bar.key]}, bar {bar.limit}: {bar.says}"


def test_training_record_names_the_pinned_corpus():
    assert RECORD["corpus_list_sha256"] == demo_corpus.list_digest()
    checked = RECORD["checked"]
    assert checked["samples"] == check_demo.N_SAMPLES
    assert all(bar.holds(checked[bar.key]) for bar in check_demo.BARS if bar.key in checked)
    assert set(checked["excerpt_bits"]) == {f.path for f in demo_corpus.pinned_files() if f.held_out}
    # Stored in bf16 and run here, the model knows what it knew in fp32 when training ended.
    drift = checked["held_out_bits_per_byte"] - RECORD["held_out_bits_per_byte_fp32_weights"]
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

    assert check_demo.bits(Uniform(), "ab" * 700) == pytest.approx(8.0 * 1400)
