"""Programs in the fragment layout over small models, their weights, and GPUs that do not exist."""

from __future__ import annotations

import numpy as np
from programs import spec

from flashformer.backends.cuda.specialize import DeviceFacts
from flashformer.check import CheckedProgram, check
from flashformer.checkpoint import Tensor
from flashformer.formats import BF16, Format, from_f32
from flashformer.model.spec import ModelSpec
from flashformer.program import Program, Target, build
from flashformer.program.ir import Layout

H100 = DeviceFacts("H100", 132, 232448, (9, 0))
B200 = DeviceFacts("B200", 148, 232448, (10, 0))
RTX_5090 = DeviceFacts("RTX 5090", 170, 101376, (12, 0))


def cuda_target(
    *, n_workers: int = 4, fmt: Format = BF16, kv: Format = BF16, quant: Format | None = None,
    head_quant: Format | None = None, rows: int = 16, streams: int = 2, ctx: int = 600, exact: bool = False,
) -> Target:  # fmt: skip
    return Target(n_workers, fmt, kv, rows, streams, ctx, exact, quant, head_quant or quant, Layout.FRAGMENTS)


def cuda_program(model: ModelSpec | None = None, **target: object) -> Program:
    return build(model or spec(n_layers=2), cuda_target(**target))  # type: ignore[arg-type]


def checked(model: ModelSpec | None = None, **target: object) -> CheckedProgram:
    return check(cuda_program(model, **target))


def role_shapes(model: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Of every tensor that a Program over `model` names."""
    shapes: dict[str, tuple[int, ...]] = {
        "embed": (model.vocab_size, model.d_model),
        "final_norm": (model.d_model,),
    }
    if not model.tied:
        shapes["lm_head"] = (model.vocab_size, model.d_model)
    for i, la in enumerate(model.layers):
        matrices = {
            "q": (la.q_width, model.d_model), "k": (la.kv_width, model.d_model), "v": (la.kv_width, model.d_model),
            "o": (model.d_model, la.q_width), "gate": (la.d_ff, model.d_model), "up": (la.d_ff, model.d_model),
            "down": (model.d_model, la.d_ff),
        }  # fmt: skip
        shapes |= {f"layers.{i}.{name}": shape for name, shape in matrices.items()}
        shapes |= {f"layers.{i}.{name}_bias": shape[:1] for name, shape in matrices.items()}
        norms = ("attn_norm", "ffn_norm", "attn_post_norm", "ffn_post_norm")
        shapes |= {f"layers.{i}.{name}": (model.d_model,) for name in norms}
    return shapes


def random_weights(model: ModelSpec, stored: Format = BF16, seed: int = 0) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    return {
        role: Tensor(role, stored, from_f32(rng.normal(size=shape).astype(np.float32), stored))
        for role, shape in role_shapes(model).items()
    }
