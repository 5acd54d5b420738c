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


def at_place(program: Program, place: int) -> NumericalError:
    """The error for the first place as kernels count them: -1 after the embedding, 2 * layer after its attention,
    2 * layer + 1 after its feed-forward, 2 * n_layers in the logits.
    """
    if place == 2 * program.spec.n_layers:
        return in_logits(program)
    layer, op = (place // 2, Op.GATE_UP) if place % 2 == 0 else ((place + 1) // 2, Op.QKV)
    if layer == program.spec.n_layers:
        layer, op = -1, Op.LM_HEAD
    return in_residual(program, next(p for p in program.phases if p.op is op and p.layer == layer))


def _error(where: str, layer: int) -> NumericalError:
    return NumericalError(
        f"NaN or Inf appeared in {where}: expected finite numbers. The weights may be damaged, or overflow in their "
        "format: check the file, or load with dtype='f32'",
        layer,
    )
