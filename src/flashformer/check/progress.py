"""Progress: every wait is reached by the workers that run, in a forward with the head and in one without."""

from __future__ import annotations

from ..program.ir import Program
from .arrivals import schedule
from .facts import Finding, task_name

RULE = "progress"


def progress(program: Program) -> tuple[list[Finding], dict[str, int]]:
    """Findings, and how many waits were proved, the two final ones included."""
    findings, n_waits = [], 0
    for name, n_phases in (("with the head", len(program.phases)), ("without the head", program.head_begin)):
        plan = schedule(program.phases[:n_phases])
        counted, final = plan.arrivals(), program.final_wait(n_phases)
        for worker, of_class in enumerate(plan.class_of):
            stuck = int((plan.levels[of_class] <= counted).sum())
            if stuck < n_phases:
                findings.append(
                    Finding(
                        RULE,
                        f"forward {name}: {task_name(program, stuck, worker)} waits for "
                        f"{plan.levels[of_class, stuck]} arrivals, but only {counted} are ever counted",
                    )
                )
        if counted != final:
            findings.append(
                Finding(RULE, f"forward {name}: the end waits for {final} arrivals, but {counted} are counted")
            )
        n_waits += n_phases * program.target.n_workers + 1
    return findings, {"progress": n_waits}
