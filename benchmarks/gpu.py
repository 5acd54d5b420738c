"""Everything that only a machine with a GPU can tell: first whether the kernel is right there, then how fast it is.

    python benchmarks/gpu.py [--stage 0,1,2,3,4] [--budget-s 480] [--out FOLDER] [--plan]
    python benchmarks/gpu.py --compile

Runs from a checkout as it is. docs/measuring.md says what each stage writes. Compiled kernels are kept in the folder
that the variable FLASHFORMER_CACHE names. --compile fills it without a GPU, for H100 and H200; where that folder is
then found by the same version of NVRTC, and belongs to the user with nobody else allowed to write, stages compile
nothing. The variable COMMIT names the commit where git is missing.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent / "src"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from gpu_stages import plan  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--stage", type=plan.parse_stages, default=plan.DEFAULT, help="numbers, e.g. 0,1,2")
    parser.add_argument("--budget-s", type=plan.parse_seconds, default=plan.BUDGET_S, help="for all stages together")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or HERE / "results"))
    parser.add_argument("--plan", action="store_true", help="print the stages and their shares, and run nothing")
    parser.add_argument("--compile", action="store_true", help="fill the cache of kernels, and run nothing")
    parser.add_argument("--inside", type=int, help=argparse.SUPPRESS)  # this process is that one stage
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)  # units of it that are done
    given = parser.parse_args(arguments)
    if given.compile:
        from gpu_stages import ahead

        return ahead.fill_cache()
    if given.plan:
        print(plan.describe(given.stage, given.budget_s))
        return 0
    if given.inside is not None:
        code = plan.run_inside(given.inside, given.budget_s, given.out, given.skip)
        if code in (plan.LOST, plan.HUNG):
            sys.stderr.flush()
            os._exit(code)
        return code
    return plan.run_stages(given.stage, given.budget_s, given.out, plan.run_apart)


if __name__ == "__main__":
    sys.exit(main())
