"""NaN and Inf: what to say when a worker sees one in the residual or in its logits."""

from __future__ import annotations

from ..errors import NumericalError
from ..program.ir import Op, Phase, Program


def in_residual(program: Program, phase: Phase) -> NumericalError:
    """The error for a residual whose sum of squares was not finite at the norm of `phase`, the first that saw it.

    A norm sees what was added since the norm before it: attention of its own layer at gate_up, the previous
    layer's feed-forward at qkv and lm_head.
    """
    if phase.op is Op.GATE_UP:
        return _error(f"the attention of layer {phase.layer}", phase.layer)
    before = (program.spec.n_layers if phase.op is Op.LM_HEAD else phase.layer) - 1
    return _error(f"the feed-forward of layer {before}" if before >= 0 else "the embedding", before)


def in_logits(program: Program) -> NumericalError:
    """The error for logits that are not finite although the residual is."""
    return _error("the logits", program.spec.n_layers)


def _error(where: str, layer: int) -> NumericalError:
    return NumericalError(
        f"NaN or Inf appeared in {where}: expected finite numbers. The weights may be damaged, or overflow in their "
        "format: check the file, or load with dtype='f32'",
        layer,
    )
