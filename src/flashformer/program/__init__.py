"""ModelSpec + Target in, Program out: phases, spans, hand-offs, tapes, memory; pure data."""

from .build import build
from .ir import Program, Target

__all__ = ["Program", "Target", "build"]
