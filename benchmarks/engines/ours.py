"""flashformer, for serve.py: its kernel, driven as `flashformer bench` drives it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

import flashformer as ff
from flashformer.backends.base import Want
from flashformer.bench.decode import fill
from flashformer.engine.plan import weight_read_bytes


class Engine:
    wants_logits = False

    def load(self, folder: str, threads: int, ctx: int, **options: Any) -> dict[str, Any]:
        """`options` of flashformer.load."""
        self.llm = ff.load(folder, threads=threads, ctx=ctx, **options)
        plan = self.llm.plan
        body, head = (plan.dtype if quant == "none" else quant for quant in (plan.quant, plan.head_quant))
        return {
            "version": ff.__version__,
            "weight_bytes": weight_read_bytes(self.llm.program),
            "weights": body if head == body else f"{body}, head {head}",
            "kv": plan.kv_dtype,
        }

    def prompt(self, ids: NDArray[np.int32]) -> int:
        fill(self.llm, 0, ids, self._want)
        self.n = len(ids)
        return int(self.llm.kernel.tokens[0])

    def step(self, token: int) -> int:
        kernel, rows = self.llm.kernel, self.llm.kernel.rows
        rows.token[0], rows.slot[0], rows.pos[0], rows.want[0] = token, 0, self.n, self._want
        kernel.forward(1)
        self.n += 1
        return int(kernel.tokens[0])

    def rewind(self, n: int) -> bool:
        self.n = n
        return True

    def last_logits(self) -> NDArray[np.float32]:
        row: NDArray[np.float32] = self.llm.kernel.logits[0]
        return row

    @property
    def _want(self) -> Want:
        return Want.LOGITS if self.wants_logits else Want.TOKEN
