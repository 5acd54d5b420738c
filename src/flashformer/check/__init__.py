"""A Program in, a CheckedProgram out: proved before anything runs. Backends accept nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import ProgramError
from ..program.ir import Program
from .balance import balance
from .bounds import bounds
from .coverage import cover
from .facts import Finding, gather
from .faithful import faithful
from .order import order
from .progress import progress
from .share import share

__all__ = ["CheckedProgram", "Finding", "check", "findings"]

SHOWN = 8


@dataclass(frozen=True)
class CheckedProgram:
    """A proved Program. `proved` says how many facts of each kind were established, by name."""

    program: Program
    proved: Mapping[str, int]


def check(program: Program) -> CheckedProgram:
    """Proves what `_prove` lists: bounds to balance. Raises ProgramError with the findings otherwise."""
    found, proved = _prove(program)
    if found:
        more = [f"... and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
        text = "\n  ".join([str(finding) for finding in found[:SHOWN]] + more)
        raise ProgramError(
            f"the program for {program.target.n_workers} workers failed its proof, {len(found)} findings:\n  {text}\n"
            "This is a bug of flashformer: please report it with the model's config.json."
        )
    return CheckedProgram(program, proved)


def findings(program: Program) -> list[Finding]:
    """Why a Program must not run; empty for a sound one."""
    return _prove(program)[0]


def _prove(program: Program) -> tuple[list[Finding], dict[str, int]]:
    """Each stage reasons with what the one before it has proved."""
    found, proved = bounds(program)
    if found:
        return found, proved
    facts = gather(program)
    found, covered = cover(program, facts)
    proved |= covered
    if found:
        return found, proved
    for more, counts in (faithful(program), order(program, facts), share(program), progress(program), balance(program)):
        found += more
        proved |= counts
    return found, proved
