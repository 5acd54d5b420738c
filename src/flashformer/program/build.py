"""ModelSpec + Target -> Program."""

from __future__ import annotations

from dataclasses import replace

from ..model.spec import ModelSpec
from .ir import Op, Phase, Program, Span, Target
from .lower import lower
from .memory import plan_memory
from .split import Dealer, cyclic_spans, even_spans
from .sync import full_barriers
from .tape import make_tapes


def build(spec: ModelSpec, target: Target) -> Program:
    """Lowers, splits, places and synchronises. The result is unproved: hand it to `check`."""
    lowered = lower(spec, target)
    dealer = Dealer(target.n_workers)
    waits = full_barriers(len(lowered.phases), target.n_workers)
    phases = tuple(
        replace(phase, spans=_spans(phase, dealer), waits=wait)
        for phase, wait in zip(lowered.phases, waits, strict=True)
    )
    return Program(
        spec=spec,
        target=target,
        phases=phases,
        head_begin=next(i for i, phase in enumerate(phases) if phase.op is Op.LM_HEAD),
        tapes=make_tapes(phases, target.n_workers),
        packed_bytes=lowered.packed_bytes,
        embed_offset=lowered.embed_offset,
        memory=plan_memory(spec, target, lowered.weights_bytes),
    )


def _spans(phase: Phase, dealer: Dealer) -> tuple[Span, ...]:
    n_workers = len(dealer.read_bytes)
    if phase.matrix is not None:
        return dealer.deal(phase.n_units, phase.matrix.tile_bytes)
    if phase.op is Op.EMBED:
        return even_spans(phase.n_units, n_workers)
    return cyclic_spans(phase.n_units, n_workers, max(phase.layer, 0))
