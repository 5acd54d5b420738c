"""Products of the device kernel on the simulated GPU, against NumPy. Whole numbers, so sums are exact in any order and
equality is of bits; where norms and exponentials come in, the tolerance is that of fp32."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from gpu_on_host.products import ALL_FORMATS, F32Array, Forward, Matrix, Shape, Step, as_input, padded, random_matrix
from numpy.typing import NDArray

from flashformer.backends.noise import gumbel
from flashformer.program.ir import Op

FORMATS = [name for name, fmt in ALL_FORMATS.items() if name != "f32" and not fmt.codebook]
WIDTHS = (64, 2048 + 32, 4935)  # of k: one slice, two, three; the last two end inside a unit of some formats


def whole(rng: np.random.Generator, *shape: int, most: int = 4) -> F32Array:
    return rng.integers(-most, most + 1, shape).astype(np.float32)


def one_product(
    rng: np.random.Generator,
    matrix: Matrix,
    rows: int,
    n_blocks: int,
    spans: Sequence[int] | None = None,
    **options: int,
) -> tuple[F32Array, F32Array]:
    """(rows, n_out) of a qkv phase without norm: what the kernel stores, and what it should."""
    n_out, k = matrix.values.shape
    bias, x = whole(rng, padded(n_out, 16)), whole(rng, rows, k)
    step = Step(Op.QKV, matrix, bias=bias, spans=spans)
    forward = Forward(Shape(rows, k, qkv=n_out), [step], n_blocks, **options)
    forward.buffer["residual"][:rows, :k] = x
    assert forward.run() == ""
    expected = as_input(x, matrix.fmt) @ matrix.values.T + bias[:n_out]
    assert np.array_equal(expected, expected.astype(np.float32)), "the test itself is not exact"
    assert np.isnan(forward.buffer["qkv"][rows:]).all()
    return forward.buffer["qkv"][:rows, :n_out].copy(), expected.astype(np.float32)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows", [1, 2, 5, 8, 16])
def test_every_format(name: str, rows: int) -> None:
    rng = np.random.default_rng(rows)
    for k in WIDTHS:
        for n_blocks, n_out in ((2, 75), (3, 16)):  # 5 tiles, the last one not full; 1 tile, so blocks without any
            matrix = random_matrix(rng, name, n_out, k, most=5)
            got, expected = one_product(rng, matrix, rows, n_blocks)
            np.testing.assert_array_equal(got, expected, f"{name}, {rows} rows, k {k}, {n_blocks} blocks")


@pytest.mark.parametrize("name", FORMATS)
def test_codes_at_their_extremes(name: str) -> None:
    rng = np.random.default_rng(0)
    got, expected = one_product(rng, random_matrix(rng, name, 48, 2048 + 96, most=127), 3, 2)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("spans", "n_slots", "acc_tiles"), [((7, 0, 2), 2, 16), ((0, 0, 9), 2, 1), ((3, 3, 3), 5, 0), ((1, 7, 1), 1, 3)]
)
def test_rings_and_spans(spans: tuple[int, ...], n_slots: int, acc_tiles: int) -> None:
    """Few slots, blocks without tiles, accumulators in shared and in global memory."""
    rng = np.random.default_rng(1)
    for name in ("bf16", "int4-g64-zp"):
        matrix = random_matrix(rng, name, 9 * 16, 2048 * 2 + 64, most=5)
        got, expected = one_product(rng, matrix, 4, 3, spans, n_slots=n_slots, acc_tiles=acc_tiles)
        np.testing.assert_array_equal(got, expected)


def test_any_schedule_gives_the_same() -> None:
    rng = np.random.default_rng(2)
    matrix = random_matrix(rng, "int8-g32", 75, 2080, most=5)
    for seed in range(20):
        got, expected = one_product(rng, matrix, 5, 2, n_slots=2, seed=seed, policy=seed % 5)
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", ["bf16", "f16", "int8-g64", "int4-g32-zp"])
def test_bits_of_a_row_depend_on_nothing_else(name: str) -> None:
    """Not on the other rows, those that the kernel has room for, or the blocks. Here sums do round."""
    rng = np.random.default_rng(3)
    k, n_out = 2048 + 640, 75
    matrix, x = random_matrix(rng, name, n_out, k, most=5), rng.standard_normal((16, k)).astype(np.float32)
    norm = rng.standard_normal(k).astype(np.float32)

    def rows_of(rows: Sequence[int], n_blocks: int, n_rows: int) -> F32Array:
        forward = Forward(Shape(len(rows), k, qkv=n_out), [Step(Op.QKV, matrix, norm=norm)], n_blocks, n_rows=n_rows)
        forward.buffer["residual"][: len(rows), :k] = x[list(rows)]
        assert forward.run() == ""
        return forward.buffer["qkv"][: len(rows), :n_out].copy()

    every = rows_of(range(16), 2, 16)
    assert np.isfinite(every).all()
    for rows, n_blocks, n_rows in (((3,), 2, 1), ((3,), 3, 16), ((3,), 2, 8), ((7, 3), 1, 4), ((15, 0, 3, 9, 2), 2, 8)):
        np.testing.assert_array_equal(rows_of(rows, n_blocks, n_rows), every[list(rows)])


@pytest.mark.parametrize("name", ["bf16", "f16", "int8-g128", "int4-g32"])
@pytest.mark.parametrize("head_dim", [32, 14])
def test_a_chain_over_hand_offs(name: str, head_dim: int) -> None:
    """o_proj -> down -> qkv -> lm_head: every phase reads what all blocks left before."""
    rng = np.random.default_rng(4)
    rows, d, d_ff, n_heads = 5, 2048 + 32, 201, 3
    shape = Shape(rows, d, d_ff=d_ff, qkv=80, vocab_size=100, n_heads=n_heads, head_dim=head_dim)
    o_proj = random_matrix(rng, name, d, n_heads * head_dim, most=3)
    down, qkv = random_matrix(rng, name, d, d_ff, most=3), random_matrix(rng, name, 80, d, most=3)
    head, bias = random_matrix(rng, "bf16", 100, d, most=3), whole(rng, padded(d, 16))
    window = 300
    steps = [
        Step(Op.O_PROJ, o_proj, bias=bias, record={"scale": 0.5, "window": window}),
        Step(Op.DOWN, down),
        Step(Op.QKV, qkv, layer=1),
        Step(Op.LM_HEAD, head, record={"scale": 0.25}),
    ]
    forward = Forward(shape, steps, 3)
    pos = np.array([0, 255, 256, 555, 600])
    forward.launch["pos"][0, :rows], forward.launch["want"][0, :rows] = pos, 2
    attention, hidden, residual = whole(rng, rows, n_heads, head_dim), whole(rng, rows, d_ff), whole(rng, rows, d)
    first = np.maximum(pos - window + 1, 0) // 256
    forward.partial[np.arange(rows), :, first, :head_dim] = attention
    forward.buffer["hidden"][:rows, :d_ff], forward.buffer["residual"][:rows, :d] = hidden, residual
    assert forward.run() == ""

    def product(x: NDArray[np.floating], matrix: Matrix) -> NDArray[np.float64]:
        y: NDArray[np.float64] = as_input(x, matrix.fmt) @ matrix.values.T
        return y

    after = residual + (product(attention.reshape(rows, -1), o_proj) + bias[:d]) / 2 + product(hidden, down)
    np.testing.assert_array_equal(forward.buffer["residual"][:rows, :d], after)
    np.testing.assert_array_equal(forward.buffer["qkv"][:rows, :80], product(after, qkv))
    logits = product(after, head) / 4
    np.testing.assert_array_equal(forward.buffer["logits"][:rows, :100], logits)
    scores, ids = forward.buffer["candidates"][:, :rows, 0], forward.buffer["candidates"].view(np.int32)[:, :rows, 1]
    best = [min((-scores[b, r], ids[b, r]) for b in range(3))[1] for r in range(rows)]
    np.testing.assert_array_equal(best, logits.argmax(axis=1))
    assert (forward.times > 0).all()
    assert (np.diff(forward.times.astype(np.int64).reshape(3, -1)) >= 0).all()
    assert forward.counter[0] == (int(forward.launch["base"][0]) + 3 * 4) % 2**32


def picked(rng: np.random.Generator, name: str, n_out: int, k: int) -> tuple[Matrix, NDArray[np.int64]]:
    """A matrix whose outputs are single elements of the input, and which."""
    blank, at = random_matrix(rng, name, n_out, k, most=0), rng.integers(0, k, n_out)
    values = blank.values.copy()
    values[np.arange(n_out), at] = 1
    assert name == "f16"
    tiles = np.zeros((padded(n_out, 16), padded(k, 32)), np.float16)
    tiles[:n_out, :k] = values
    parts = [
        tiles[t : t + 16, u : u + 32].ravel()
        for s in range(0, tiles.shape[1], 2048)
        for t in range(0, len(tiles), 16)
        for u in range(s, min(s + 2048, tiles.shape[1]), 32)
    ]
    return Matrix(blank.fmt, values, np.concatenate(parts).view(np.uint8)), at


@pytest.mark.parametrize("rows", [1, 7, 16])
@pytest.mark.parametrize("d", [64, 101, 2048 + 132])
def test_norms_and_folds(rows: int, d: int) -> None:
    """What gate_up and lm_head see of the residual, and what down adds to it, with branches whose norm comes late."""
    rng = np.random.default_rng(rows * d)
    n_out, eps, fold_eps, fold_scale = 80, 1e-3, 1e-2, 0.7
    norm, fold_norm = (rng.standard_normal(d).astype(np.float32) for _ in range(2))
    qkv, at = picked(rng, "f16", n_out, d)
    down = random_matrix(rng, "f16", d, 64, most=3)
    fold = {"fold_eps": fold_eps, "fold_scale": fold_scale}
    steps = [
        Step(Op.QKV, qkv, norm=norm, fold="ffn_out", fold_norm=fold_norm, record={"norm_eps": eps, **fold}),
        Step(Op.DOWN, down, fold="ffn_out", fold_norm=fold_norm, to="attention_out", record=fold),
    ]
    forward = Forward(Shape(rows, d, qkv=n_out), steps, 2)
    x, branch, hidden = rng.standard_normal((rows, d)), 3 * rng.standard_normal((rows, d)), whole(rng, rows, 64)
    forward.buffer["residual"][:rows, :d], forward.buffer["ffn_out"][:rows, :d] = x, branch
    forward.buffer["hidden"][:rows] = hidden
    assert forward.run() == ""

    def normed(y: NDArray[np.floating], e: float, weight: F32Array) -> NDArray[np.float64]:
        result: NDArray[np.float64] = y / np.sqrt(np.mean(y * y, axis=1, keepdims=True) + e) * weight
        return result

    folded = x + normed(branch, fold_eps, fold_norm) * fold_scale
    seen = normed(folded, eps, norm)[:, at]
    np.testing.assert_allclose(forward.buffer["qkv"][:rows, :n_out], seen, rtol=2**-10, atol=1e-6)
    np.testing.assert_allclose(forward.buffer["residual"][:rows, :d], folded, rtol=2e-6, atol=2e-6)
    np.testing.assert_array_equal(forward.buffer["attention_out"][:rows, :d], hidden @ down.values.T)


def test_f16_takes_rows_of_any_size() -> None:
    """Rows are scaled slice by slice, so that neither 1e38 nor 1e-38 leaves the range of f16."""
    rng = np.random.default_rng(10)
    rows, d_ff, d = 8, 2048 + 700, 2048
    matrix, at = picked(rng, "f16", d, d_ff)
    forward = Forward(Shape(rows, d, d_ff=d_ff), [Step(Op.DOWN, matrix)], 2, more_tiles=64)
    sizes = np.array([1, 1e30, 1e-30, 1e38, 1e-38, 1e-44, 0, 65504])
    wide = rng.standard_normal((rows, d_ff)) * 2.0 ** rng.integers(-16, 1, (rows, d_ff)) * sizes[:, None]
    wide[1, 2048:] *= 1e-20
    x = wide.clip(-3e38, 3e38).astype(np.float32)
    forward.buffer["hidden"][:rows, :d_ff], forward.buffer["residual"][:rows] = x, 0
    assert forward.run() == ""
    expected = as_input(x, matrix.fmt)[:, at].astype(np.float32)
    np.testing.assert_array_equal(forward.buffer["residual"][:rows, :d], expected)


@pytest.mark.parametrize("activation", [0, 1])
def test_gate_up(activation: int) -> None:
    rng = np.random.default_rng(5)
    rows, d, d_ff = 3, 96, 40
    halves = random_matrix(rng, "bf16", 2 * d_ff, d, most=2)  # 8 gate outputs, 8 up outputs, ...
    bias, x = whole(rng, 2 * d_ff), whole(rng, rows, d, most=1)
    steps = [Step(Op.GATE_UP, halves, bias=bias, record={"activation": activation})]
    forward = Forward(Shape(rows, d, d_ff=d_ff), steps, 2)
    forward.buffer["residual"][:rows, :d] = x
    assert forward.run() == ""
    sums = (x @ halves.values.T + bias).reshape(rows, -1, 2, 8)
    gate, up = sums[:, :, 0].reshape(rows, d_ff), sums[:, :, 1].reshape(rows, d_ff)
    if activation == 0:
        expected = gate / (1 + np.exp(-gate)) * up
    else:
        expected = gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) / 2 * up
    np.testing.assert_allclose(forward.buffer["hidden"][:rows, :d_ff], expected, rtol=1e-5, atol=1e-6)


def test_head_rows() -> None:
    """Rows that want something, in another order than in the forward; softcap, noise, ties, logits where wanted."""
    rng = np.random.default_rng(6)
    d, vocab, softcap = 64, 75, 30.0
    head, norm = random_matrix(rng, "f16", vocab, d, most=3), np.ones(d, np.float32)
    forward = Forward(
        Shape(6, d, vocab_size=vocab), [Step(Op.LM_HEAD, head, norm=norm, record={"softcap": softcap})], 3
    )
    x = rng.standard_normal((6, d)).astype(np.float32)
    x[1] = 0  # all logits are equal
    forward.buffer["residual"][:6, :d] = x
    launch = forward.launch
    rows = [1, 2, 4, 5]
    launch["n_head_rows"], launch["head_row"][0, :4] = 4, rows
    launch["want"][0, :6] = [0, 1, 2, 0, 1, 1]
    launch["temperature"][0, 4:6], launch["seed"][0, 4], launch["choice"][0, 4] = 0.7, 2**40 + 5, 3
    launch["pos"][0, 4], launch["top_k"][0, 5] = 123, 4
    assert forward.run() == ""
    logits = as_input(x / np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=1, keepdims=True) + 1e-30), head.fmt)
    logits = np.tanh(logits @ head.values.T / softcap) * softcap
    got = forward.buffer["logits"]
    np.testing.assert_allclose(got[[1, 3], :vocab], logits[[2, 5]], rtol=2e-3, atol=2e-3)
    assert np.isnan(got[[0, 2]]).all()
    assert np.isnan(got[4:]).all()
    scores, ids = forward.buffer["candidates"][:, :4, 0], forward.buffer["candidates"].view(np.int32)[:, :4, 1]
    spans = [(s["begin"] * 16, min(s["end"] * 16, vocab)) for s in forward.schedule[0]]
    noisy = logits[4] / 0.7 + gumbel(2**40 + 5, 3, 123, np.arange(vocab))
    for block, (begin, end) in enumerate(spans):
        assert ids[block, 0] == begin, "ties go to the lower id"
        assert ids[block, 1] == begin + got[1, begin:end].argmax()
        assert scores[block, 1] == got[1, begin:end].max()
        assert ids[block, 2] == begin + noisy[begin:end].argmax()
        assert ids[block, 3] == -1, "chosen from the logits later"


def test_a_block_without_tiles_has_no_candidate() -> None:
    rng = np.random.default_rng(7)
    forward = Forward(Shape(1, 64, vocab_size=16), [Step(Op.LM_HEAD, random_matrix(rng, "bf16", 16, 64, most=3))], 2)
    forward.buffer["residual"][:1] = whole(rng, 1, 64)
    assert forward.run() == ""
    ids = forward.buffer["candidates"].view(np.int32)[:, 0, 1]
    assert ids[1] == -1
    assert 0 <= ids[0] < 16


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2e19])  # the square of the last one is beyond fp32
def test_what_is_not_finite_is_reported(bad: float) -> None:
    rng = np.random.default_rng(8)
    matrix = random_matrix(rng, "bf16", 64, 64, most=3)
    steps = [Step(Op.QKV, matrix, layer=2), Step(Op.GATE_UP, matrix, layer=2), Step(Op.LM_HEAD, matrix)]
    for begin, place in ((0, 3), (1, 4), (2, 5)):  # n_layers is 3
        forward = Forward(Shape(2, 64), steps[begin:], 2)
        forward.buffer["residual"][:2] = whole(rng, 2, 64)
        forward.buffer["residual"][1, 17] = bad
        assert forward.run() == ""
        np.testing.assert_array_equal(forward.report[8:], 2 + place)


def test_logits_that_are_not_finite_are_reported() -> None:
    rng = np.random.default_rng(9)
    head = random_matrix(rng, "bf16", 64, 64, most=3)
    forward = Forward(Shape(2, 64), [Step(Op.LM_HEAD, head, record={"scale": 3e38, "softcap": 5})], 2)
    forward.buffer["residual"][:2] = whole(rng, 2, 64)
    assert forward.run() == ""
    np.testing.assert_array_equal(forward.report[8:], 2 + 6)


@pytest.mark.parametrize("fmt", ["bf16", "int8-g64"])
def test_the_kernel_for_one_row_gives_the_bits_of_the_others(fmt: str) -> None:
    """down of three slices, then qkv of its result: two slices behind a norm."""
    d, d_ff, results = 2080, 4200, []
    for n_rows in (1, 8):
        rng = np.random.default_rng(4)
        down, qkv = random_matrix(rng, fmt, d, d_ff, 2), random_matrix(rng, fmt, 40, d, 2)
        steps = [Step(Op.DOWN, down), Step(Op.QKV, qkv, norm=rng.normal(size=d).astype(np.float32))]
        forward = Forward(Shape(1, d, d_ff=d_ff, qkv=40), steps, 2, n_rows=n_rows, more_tiles=64)
        forward.buffer["residual"][0, :d] = rng.normal(size=d)
        forward.buffer["hidden"][0, :d_ff] = rng.normal(size=d_ff)
        assert forward.run() == ""
        results.append(np.concatenate([forward.buffer["residual"][0, :d], forward.buffer["qkv"][0, :40]]))
    assert np.isfinite(results[0]).all()
    np.testing.assert_array_equal(*results)
