"""embed on the simulated GPU: the rows of the embedding, also where they lie in the tiles of lm_head."""

from __future__ import annotations

import numpy as np
import pytest
from gpu_on_host.one_phase import Group, OnePhase
from programs import spec

from flashformer.formats import BF16, F16, QUANTS, Format, from_f32, round_to
from flashformer.program import Target, build
from flashformer.program.ir import Layout, Op, Space
from flashformer.program.pack import pack
from flashformer.quantize import round_weights

QUANT_NAMES = ["int8-g32", "int8-g64", "int8-g128", "int4-g32", "int4-g64", "int4-g128", "int4-g32-zp", "int4-g128-zp"]


def embedded(tied: bool, weights: Format, head: Format | None, d_model: int, n_workers: int) -> None:
    model = spec(vocab_size=101, d_model=d_model, head_dim=16, n_heads=1, n_kv_heads=1, d_ff=32, tied=tied)
    target = Target(n_workers, weights, BF16, 16, 2, 256, head_quant=head, layout=Layout.FRAGMENTS)
    program = build(model, target)
    kernel = OnePhase(program, Op.EMBED)
    random = np.random.default_rng(d_model)
    table = random.normal(size=(101, d_model)).astype(np.float32)
    if tied:
        matrix = program.phases[program.head_begin].matrix
        assert matrix is not None
        raw = pack(matrix, [table if head else from_f32(table, weights)]).view(np.uint8).reshape(-1)
        kernel.weights[matrix.offset : matrix.offset + raw.size] = raw
    else:
        raw = from_f32(table, weights).view(np.uint8).reshape(-1)
        kernel.weights[program.embed_offset : program.embed_offset + raw.size] = raw
    values = round_weights(table, head) if tied and head else round_to(table, weights)
    tokens = random.integers(0, 101, 5)
    kernel.launch["token"][0, :5] = tokens
    kernel.phase["scale"] = 1.5
    assert kernel.run([Group(0, 0, 3), Group(1, 7, 2)]) == ""
    residual = kernel.buffer(Space.RESIDUAL)
    assert np.array_equal(residual[:5, :d_model], values[tokens] * np.float32(1.5))
    assert (residual[:5, d_model:] == 0).all(), "padding is not zero"
    assert np.isnan(residual[5:]).all(), "rows beyond the forward's were written"


@pytest.mark.parametrize("weights", [BF16, F16], ids=["bf16", "f16"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("d_model", [48, 200, 2080])
def test_rows_of_the_embedding(tied: bool, weights: Format, d_model: int) -> None:
    embedded(tied, weights, None, d_model, n_workers=3)


@pytest.mark.parametrize("name", QUANT_NAMES)
@pytest.mark.parametrize("d_model", [96, 4224])
def test_a_tied_quantized_embedding(name: str, d_model: int) -> None:
    embedded(True, BF16, QUANTS[name], d_model, n_workers=2)
