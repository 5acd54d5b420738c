"""The reference backend against transformers in float32, and its own watchfulness."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from programs import with_wait
from tiny import Tiny, forward, put, relative_error, tiny

from flashformer.backends.base import Want
from flashformer.backends.noise import gumbel
from flashformer.backends.reference import ReferenceKernel
from flashformer.check import CheckedProgram, check
from flashformer.checkpoint import Tensor
from flashformer.errors import DeviceError, NumericalError, RequestError
from flashformer.formats import BF16, F32, Format, from_f32, to_f32
from flashformer.program import Target, build

TOLERANCE = 2e-4

SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True, "attention_bias": True},
    "one-kv-head": {"num_key_value_heads": 1, "head_dim": 16, "mlp_bias": True},
    "every-head-its-own": {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 6, "hidden_size": 21},
    "wide": {"num_hidden_layers": 1, "hidden_size": 132, "intermediate_size": 203, "vocab_size": 1100, "head_dim": 32},
    "llama3-rope": {
        "rope_scaling": {
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        }
    },
}  # fmt: skip


def kernel_of(
    model: Tiny, *, n_workers: int = 3, weights: Format = F32, kv: Format = F32, ctx: int = 600, streams: int = 3,
    rows: int = 16, exact: bool = False, seed: int = 0,
) -> ReferenceKernel:  # fmt: skip
    target = Target(n_workers, weights, kv, rows, streams, ctx, exact)
    return ReferenceKernel(check(build(model.spec, target)), model.tensors, seed)


def some_ids(model: Tiny, n: int, seed: int = 0) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(model.spec.vocab_size, size=n).tolist()
    return ids


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n_workers", [1, 4])
def test_prompt_equals_transformers(shape: str, n_workers: int) -> None:
    model = tiny(1, **SHAPES[shape])
    ids = some_ids(model, 16)
    kernel, expected = kernel_of(model, n_workers=n_workers), model.logits(ids)
    assert relative_error(forward(kernel, ids), expected) <= TOLERANCE
    assert kernel.tokens[:16].tolist() == expected.argmax(axis=1).tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_then_decode_equal_transformers(shape: str) -> None:
    model = tiny(2, **SHAPES[shape])
    ids = some_ids(model, 24)
    kernel, expected, pos = kernel_of(model, n_workers=2), model.logits(ids), 0
    for n in (7, 1, 10, 1, 1, 4):
        found = forward(kernel, ids[pos : pos + n], pos=pos)
        assert relative_error(found, expected[pos : pos + n]) <= TOLERANCE, (pos, n)
        pos += n
    assert pos == len(ids)


def test_attention_over_several_key_chunks() -> None:
    model = tiny(3, num_hidden_layers=1)
    ids = some_ids(model, 530)
    kernel, expected = kernel_of(model, rows=64), model.logits(ids)
    for pos in range(0, 520, 40):
        forward(kernel, ids[pos : pos + 40], pos=pos, want=Want.NOTHING)
    assert relative_error(forward(kernel, ids[520:], pos=520), expected[520:]) <= TOLERANCE


def test_slots_in_one_forward_do_not_meet() -> None:
    model = tiny(4)
    a, b, c = (some_ids(model, n, seed=n) for n in (9, 6, 5))
    kernel = kernel_of(model)
    forward(kernel, b[:4], slot=0, want=Want.NOTHING)
    put(kernel, 0, a, pos=0, slot=2, want=Want.NOTHING)
    put(kernel, 9, b[4:], pos=4, slot=0, want=Want.LOGITS)
    put(kernel, 11, c, pos=0, slot=1, want=Want.TOKEN)
    kernel.rows.want[8] = Want.LOGITS
    kernel.forward(16)
    expected = np.concatenate([model.logits(a)[8:], model.logits(b)[4:]])
    assert relative_error(kernel.logits[:3], expected) <= TOLERANCE
    assert kernel.tokens[3:8].tolist() == model.logits(c).argmax(axis=1).tolist()
    assert np.isnan(kernel.logits[3:]).all()  # those rows wanted only a token, or nothing
    assert (kernel.tokens[8:] == -1).all()


def test_a_slot_goes_back() -> None:
    model = tiny(5)
    kernel, ids = kernel_of(model), some_ids(model, 10)
    forward(kernel, some_ids(model, 12, seed=9))
    forward(kernel, ids[:6])
    assert relative_error(forward(kernel, ids[6:], pos=6), model.logits(ids)[6:]) <= TOLERANCE


def test_keys_that_were_never_written_are_an_error() -> None:
    kernel = kernel_of(tiny(5))
    forward(kernel, [1, 2, 3])
    with pytest.raises(NumericalError, match="layer 0"):
        forward(kernel, [4], pos=5)


@pytest.mark.parametrize("seed", range(4))
def test_interleaving_does_not_change_a_bit(seed: int) -> None:
    model = tiny(6)
    ids = some_ids(model, 11)
    assert np.array_equal(forward(kernel_of(model, seed=seed), ids), forward(kernel_of(model, seed=99), ids))


@pytest.mark.parametrize("exact", [False, True])
def test_bf16_error_is_no_larger_than_that_of_transformers(exact: bool) -> None:
    model = tiny(7, stored="bf16", attention_bias=True, mlp_bias=True)
    ids = some_ids(model, 16)
    expected = model.logits(ids)
    found = forward(kernel_of(model, weights=BF16, kv=F32 if exact else BF16, exact=exact), ids)
    model.oracle.bfloat16()
    theirs = relative_error(model.logits(ids), expected)
    assert theirs > 1e-3
    assert relative_error(found, expected) <= (TOLERANCE if exact else theirs)
    if not exact:
        assert relative_error(found, expected) > TOLERANCE  # rounding did take place


def test_f32_weights_rounded_to_bf16() -> None:
    model = tiny(8)
    ids = some_ids(model, 8)
    with_rounded = forward(kernel_of(model, weights=BF16, exact=True), ids)
    for name, parameter in model.oracle.named_parameters():
        if "norm" not in name and not name.endswith("bias"):
            parameter.data = parameter.data.bfloat16().float()
    assert relative_error(with_rounded, model.logits(ids)) <= TOLERANCE


def test_temperature_is_the_largest_noisy_logit() -> None:
    model = tiny(9)
    kernel, ids = kernel_of(model, n_workers=4), some_ids(model, 16)
    expected = model.logits(ids)
    put(kernel, 0, ids, pos=0, slot=0, want=Want.TOKEN)
    kernel.rows.temperature[:16], kernel.rows.seed[:16] = np.linspace(0.3, 3, 16), 2**40 + 17
    kernel.rows.choice[:16] = 2
    kernel.rows.temperature[5] = 0
    kernel.forward(16)
    vocab = np.arange(model.spec.vocab_size)
    hot = kernel.rows.temperature[:16]
    noisy = [
        x / t + gumbel(2**40 + 17, 2, i, vocab) if t else x for i, (x, t) in enumerate(zip(expected, hot, strict=True))
    ]
    assert kernel.tokens.tolist() == [int(scores.argmax()) for scores in noisy]
    assert kernel.tokens.tolist() != expected.argmax(axis=1).tolist()


def test_equal_logits_give_the_lowest_id() -> None:
    model = tiny(10)
    data = np.zeros_like(model.tensors["lm_head"].data)
    data[[17, 60, 99]] = 1
    for sign in (0, 1, -1):  # the three logits are equal, and above or below the zeros of the rest
        kernel = kernel_of(replace(model, tensors={**model.tensors, "lm_head": Tensor("x", F32, sign * data)}))
        logits = forward(kernel, [1, 2])
        for row in range(2):
            assert kernel.tokens[row] == (17 if logits[row, 17] > 0 else 0)


@pytest.mark.parametrize("stored", ["f32", "bf16"])
@pytest.mark.parametrize(
    ("role", "layer"),
    [
        ("embed", -1), ("layers.0.attn_norm", 0), ("layers.0.down", 0), ("layers.1.q", 1), ("layers.1.o", 1),
        ("layers.1.up", 1), ("final_norm", 2), ("lm_head", 2),
    ],
)  # fmt: skip
def test_nan_names_the_first_layer(role: str, layer: int, stored: str) -> None:
    model = tiny(11, stored=stored)
    values = to_f32(model.tensors[role].data, model.tensors[role].format).copy()
    values.reshape(-1)[:] = np.where(np.arange(values.size) % 7 == 3, np.nan, values.reshape(-1))
    fmt = model.tensors[role].format
    damaged = {**model.tensors, role: Tensor(role, fmt, from_f32(values, fmt))}
    kernel = kernel_of(replace(model, tensors=damaged), weights=fmt)
    with pytest.raises(NumericalError, match=f"layer {layer}" if 0 <= layer < 2 else "embedding|logits") as caught:
        forward(kernel, [1, 2, 3])
    assert caught.value.layer == layer


def test_bad_rows_are_refused() -> None:
    kernel = kernel_of(tiny(12), ctx=40, rows=32)
    good: dict[str, Any] = {"token": [5, 6, 7], "slot": [0, 0, 1], "pos": [3, 4, 0], "want": [0, 1, 2]}
    bad: list[tuple[str, dict[str, Any]]] = [
        ("row 1: token id is 101, expected 0 to 100", {"token": [5, 101, 7]}),
        ("row 0: token id is -1", {"token": [-1, 1, 7]}),
        ("row 2: slot is 3, expected 0 to 2", {"slot": [0, 0, 3]}),
        ("row 2: position is 40, expected 0 to 39", {"pos": [3, 4, 40]}),
        ("row 0: want is 3", {"want": [3, 0, 0]}),
        ("row 1 of slot 0: position is 5, expected 4", {"pos": [3, 5, 0]}),
        ("to be adjacent", {"slot": [0, 1, 0]}),
        ("row 1: temperature is nan", {"temperature": [0, np.nan, 0]}),
        ("row 2: temperature is -1", {"temperature": [0, 0, -1]}),
        ("row 1: choice is -1", {"choice": [0, -1, 0]}),
    ]
    for message, change in bad:
        for name, values in ({"temperature": [0] * 3, "choice": [0] * 3} | good | change).items():
            getattr(kernel.rows, name)[:3] = values
        with pytest.raises(RequestError, match=message):
            kernel.forward(3)
    for n_rows in (0, -1, 33):
        with pytest.raises(RequestError, match=f"forward over {n_rows} rows, expected 1 to 32"):
            kernel.forward(n_rows)
    with pytest.raises(RequestError, match="17 rows want"):
        forward(kernel, [1] * 17)
    assert forward(kernel, [1] * 16).shape == (16, 101)  # still usable


def test_closed_kernel_is_an_error() -> None:
    kernel = kernel_of(tiny(12))
    kernel.close()
    kernel.close()
    with pytest.raises(DeviceError, match="closed"):
        forward(kernel, [1])


@pytest.mark.parametrize("watched", [True, False])
def test_a_missing_wait_shows(watched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With hand-offs watched an assertion names the read; unwatched, the poison or a wrong logit gives it away."""
    model = tiny(13)
    target = Target(3, F32, F32, 16, 1, 64)
    sound = build(model.spec, target)
    ids = some_ids(model, 8)
    expected = model.logits(ids)
    if not watched:
        monkeypatch.setattr("flashformer.backends.reference.handoffs.HandOffs.check_reads", lambda *_: None)
    for p, phase in enumerate(sound.phases[: sound.head_begin + 1]):
        if p == 0:
            continue
        mutant = sound
        for w in range(target.n_workers):
            mutant = with_wait(mutant, p, w, sound.phases[p - 1].waits[w])
        shown: list[str] = []
        for seed in range(30):
            kernel = ReferenceKernel(CheckedProgram(mutant, {}), model.tensors, seed)
            try:
                if relative_error(forward(kernel, ids), expected) > TOLERANCE:
                    shown.append("wrong logits")
            except (AssertionError, NumericalError) as error:
                shown.append(str(error))
        if watched:
            assert all("hand-off is missing" in message for message in shown)
        assert shown, f"without the hand-off into phase {p} ({phase.op.value}) nothing went wrong"
