"""ModelSpec + Target -> Program."""

from __future__ import annotations

from ..model.spec import ModelSpec
from .ir import Op, Phase, Program, Span, Target
from .lower import Lowered, lower
from .memory import plan_memory
from .split import Dealer, cyclic_spans, even_spans
from .sync import full_barriers
from .tape import make_tapes


def build(spec: ModelSpec, target: Target) -> Program:
    """Lowers, splits, places and synchronises. The result is unproved: hand it to `check`."""
    layout = lower(spec, target)
    dealer = Dealer(target.n_workers)
    waits = full_barriers(len(layout.phases), target.n_workers)
    phases = tuple(
        Phase(low.op, low.layer, low.n_units, low.matrix, _spans(low, dealer), wait, low.norm, low.norm_eps, low.bias)
        for low, wait in zip(layout.phases, waits, strict=True)
    )
    return Program(
        spec=spec,
        target=target,
        phases=phases,
        head_begin=next(i for i, phase in enumerate(phases) if phase.op is Op.LM_HEAD),
        tapes=make_tapes(phases, target.n_workers),
        packed_bytes=layout.packed_bytes,
        embed_offset=layout.embed_offset,
        memory=plan_memory(spec, target, layout.weights_bytes),
    )


def _spans(low: Lowered, dealer: Dealer) -> tuple[Span, ...]:
    n_workers = len(dealer.read_bytes)
    if low.matrix is not None:
        return dealer.deal(low.n_units, low.matrix.tile_bytes)
    if low.op is Op.EMBED:
        return even_spans(low.n_units, n_workers)
    return cyclic_spans(low.n_units, n_workers, max(low.layer, 0))
