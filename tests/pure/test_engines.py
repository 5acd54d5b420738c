"""The comparison with other engines, without them: files for llama.cpp, bytes per token, ratios, what is right."""

from __future__ import annotations

import json
from pathlib import Path

import figures
import numpy as np
import pytest
from engines import gguf_file
from engines.arms import openvino_group, write_gguf
from engines.pairs import MOST_LOST, compare, pair_ratios, within
from engines.turns import Test, Turns, faster, take_turns
from make_checkpoint import write_folder

from flashformer.checkpoint import open_checkpoint
from flashformer.formats import FORMATS, to_f32
from flashformer.model import read_spec, shape_config
from flashformer.model.rope import inverse_frequencies

SMALL = {"num_hidden_layers": 2, "vocab_size": 300}


@pytest.mark.parametrize("shape", ["smollm2-135m", "qwen2.5-0.5b"])
def test_every_value_of_a_checkpoint_is_in_the_file(shape: str, tmp_path: Path) -> None:
    config = shape_config(shape) | SMALL | {"hidden_size": 128, "intermediate_size": 160}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    write_folder(tmp_path, config, FORMATS["bf16"])
    path = tmp_path / "m.gguf"
    write_gguf(tmp_path, path)
    infos, stored = list(gguf_file.infos(path)), open_checkpoint(str(tmp_path)).tensors
    assert {i.name: i.shape for i in infos} == {gguf_file.gguf_name(n): t.shape for n, t in stored.items()}
    raw = path.read_bytes()
    data = raw[-sum(i.n_bytes + -i.n_bytes % gguf_file.ALIGNMENT for i in infos) :]
    assert (len(raw) - len(data)) % gguf_file.ALIGNMENT == 0
    found, position = {}, 0
    for info in infos:
        kind = {gguf_file.F32: "<f4", gguf_file.BF16: "<u2"}[info.type]
        found[info.name] = np.frombuffer(data, kind, int(np.prod(info.shape)), position).reshape(info.shape)
        position += info.n_bytes + -info.n_bytes % gguf_file.ALIGNMENT
    for name, tensor in stored.items():
        written = found[gguf_file.gguf_name(name)]
        if written.ndim == 1:
            assert written.dtype == np.float32
            expected = to_f32(tensor.data, tensor.format)
        else:
            expected = tensor.data
        if shape == "smollm2-135m" and name.split(".")[-2] in ("q_proj", "k_proj"):
            assert not np.array_equal(written, expected)
            n_heads = len(expected) // 32  # pair i of a head lies at 2i and 2i + 1
            heads = written.reshape(n_heads, 16, 2, -1)
            expected_heads = expected.reshape(n_heads, 2, 16, -1)
            assert np.array_equal(heads[:, 5, 0], expected_heads[:, 0, 5])
            assert np.array_equal(heads[:, 5, 1], expected_heads[:, 1, 5])
        else:
            assert np.array_equal(written, expected)


def test_metadata_says_what_the_config_says() -> None:
    config = shape_config("qwen2.5-0.5b")
    pairs = gguf_file.metadata(config)
    assert pairs["general.architecture"] == "qwen2"
    assert pairs["qwen2.attention.head_count_kv"] == 2
    assert pairs["qwen2.rope.dimension_count"] == 64
    assert pairs["qwen2.rope.freq_base"] == 1e6
    assert pairs["qwen2.vocab_size"] == 151936
    assert gguf_file.gguf_name("model.layers.13.self_attn.q_proj.bias") == "blk.13.attn_q.bias"
    assert gguf_file.gguf_name("lm_head.weight") == "output.weight"


def test_rope_factors_are_those_of_our_table() -> None:
    config = shape_config("llama-3.2-1b")
    factors = gguf_file.rope_factors(config)
    assert factors is not None
    plain = config["rope_theta"] ** -(np.arange(0, 64, 2) / 64)
    [rope] = read_spec(config).ropes
    np.testing.assert_allclose(plain / factors, inverse_frequencies(rope, 64), rtol=1e-5)
    assert (factors[0], factors[-1]) == (1, 32)
    assert ((factors > 1) & (factors < 32)).any()
    assert gguf_file.rope_factors(shape_config("smollm2-135m")) is None


def test_bytes_of_a_token() -> None:
    layer = gguf_file.Info("blk.0.ffn_up.weight", (64, 96), 2)
    norm = gguf_file.Info("blk.0.attn_norm.weight", (96,), 0)
    embedding, head = gguf_file.Info("token_embd.weight", (300, 96), 8), gguf_file.Info("output.weight", (300, 96), 30)
    assert layer.n_bytes == 64 * 96 // 32 * (2 + 16)
    assert embedding.n_bytes == 300 * 96 // 32 * (2 + 32)
    assert gguf_file.token_bytes([layer, norm, embedding]) == layer.n_bytes + embedding.n_bytes
    assert gguf_file.token_bytes([layer, norm, embedding, head]) == layer.n_bytes + 300 * 96 * 2


def test_ratios_are_of_rounds_not_of_medians() -> None:
    ratio = pair_ratios([10.0, 20.0, 90.0], [5.0, 5.0, 100.0])
    assert (ratio.median, ratio.min, ratio.max) == (2.0, 0.9, 4.0)
    ours, theirs = Turns(seconds=[1.0, 2.0]), Turns(seconds=[3.0, 2.0])
    assert faster(ours, theirs).max == 3.0
    with pytest.raises(ValueError, match="argument 2"):
        pair_ratios([1.0], [1.0, 2.0])


def test_two_percent() -> None:
    assert within(980, 1000)
    assert within(1000, 980)
    assert not within(979, 1000)


def test_right_logits_are_told_from_wrong_ones() -> None:
    rng = np.random.default_rng()
    reference = rng.standard_normal((4, 1000), np.float32)
    same = compare(reference + 7, reference)  # a constant changes no probability
    assert same.lost == pytest.approx(0, abs=1e-6)
    assert (same.cosine, same.top1) == (pytest.approx(1), 1.0)
    noisy = compare(reference + 0.01 * rng.standard_normal((4, 1000), np.float32), reference)
    assert 0 < noisy.lost < MOST_LOST["bf16"]
    for wrong in (np.roll(reference, 1, axis=0), rng.standard_normal((4, 1000), np.float32)):
        assert compare(wrong, reference).lost > max(MOST_LOST.values())
    spoilt = reference.copy()
    spoilt[2, 3] = np.nan
    assert compare(spoilt, reference).lost == np.inf


class Clock:
    """An engine of `speed` tokens per second."""

    def __init__(self, speed: float) -> None:
        self.speed, self.asked = speed, 0

    def __call__(self, do: str, n: int, depth: int) -> dict[str, object]:
        self.asked += 1
        return {"ns": n / self.speed * 1e9, "tokens": [1] * n}

    def cpu_s(self) -> float:
        return 0.0


class Steady:
    def gb_s(self, seconds: float) -> float:
        return 40.0


@pytest.mark.parametrize(("deadline", "rounds"), [(float("inf"), 5), (0.0, 1)])
def test_rounds_are_whole(deadline: float, rounds: int) -> None:
    engines = {"a": Clock(100.0), "b": Clock(50.0)}
    said: list[str] = []
    turns, probes = take_turns(engines, Test("decode", 32, 8), Steady(), 5, deadline, said.append)
    assert [len(found.seconds) for found in turns.values()] == [rounds] * 2
    assert len(probes) == 2 * rounds + 1
    assert [engine.asked for engine in engines.values()] == [rounds + 1] * 2  # one to warm up
    assert bool(said) == (rounds < 5)
    assert faster(turns["a"], turns["b"]).median == pytest.approx(2)
    assert turns["a"].fraction(8 * 2e8) == pytest.approx(0.5)  # 0.2 GB per token, 100 tokens/s, of 40 GB/s


def test_positions_read_on_average() -> None:
    test = Test("decode", 10, 4)  # reads 11, 12, 13, 14
    assert test.mean_kv == 12.5
    assert test.positions >= 14


def test_groups_divide_every_row() -> None:
    assert openvino_group(shape_config("smollm2-135m")) == 64
    assert openvino_group(shape_config("llama-3.2-1b")) == 128


def test_the_newest_pair_of_a_cell_is_shown(tmp_path: Path) -> None:
    speed = {"median": 20.0, "min": 19.0, "max": 21.0}
    engines = {
        "flashformer int8-g32": {"weights": "int8-g32", "version": "1", "tokens_per_s": speed, "gb_per_s": 30.0},
        "llama.cpp Q8_0, mapped": {"version": "0.3", "tokens_per_s": speed | {"median": 10.04}, "gb_per_s": 15.0},
    }
    pair = {"ours": "flashformer int8-g32", "theirs": "llama.cpp Q8_0, mapped", "peer": "llama.cpp", "matched": True}
    pair |= {"bytes_per_token": 1.0, "times_as_fast": {"median": 2.0, "min": 1.9, "max": 2.1}}
    record = {"model": "m", "format": "int8", "test": "decode", "depth": 32, "tokens": 8, "threads": 2, "rounds": 9}
    record |= {"engines": engines, "pairs": [pair, pair | {"matched": False}], "commit": "c1"}
    record["machine"] = {"cpu": "X", "isa": "avx2"}
    prompt = record | {"test": "prefill", "depth": 0, "tokens": 512}
    without_peers = record | {"commit": "c2", "pairs": []}
    lines = [record | {"commit": "c0"}, prompt, record, without_peers]
    (tmp_path / "engines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = figures.engine_figures(tmp_path).splitlines()
    same = "llama.cpp Q8_0, mapped | 10.0 |"
    assert shown[2:] == [
        f"| m | decode, 32 cached | int8-g32 | 20.0 | 30.0 | {same} 15.0 | 2.00 (1.90 to 2.10) | 1.000 | 9 | c1 |",
        f"| m | prompt of 512 | int8-g32 | 20.0 |  | {same}  | 2.00 (1.90 to 2.10) | 1.000 | 9 | c1 |",
        "",
        "Engines taking turns, pairs within a round, with llama.cpp 0.3; on X, avx2, 2 threads.",
    ]
    with (tmp_path / "engines.jsonl").open("a") as results:
        results.write(json.dumps(record | {"machine": {"cpu": "Y", "isa": "amx"}, "commit": "c3"}) + "\n")
    first, _, second, note = figures.engine_figures(tmp_path).split("\n\n")
    assert first.splitlines() == shown[:4]
    assert second.splitlines()[2:] == [shown[2].replace("| c1 |", "| c3 |")]
    assert note.endswith("on Y, amx, 2 threads.")
    assert figures.engine_figures(tmp_path / "nothing") == ""
