"""Mistakes that kernels of this kind were shipped with, put back into a copy of the device source."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from gpu_on_host.build import DEVICE


@dataclass(frozen=True)
class Fault:
    """`edits`: (file, text, text in its place); each text occurs exactly once. `found`: part of what is found."""

    name: str
    edits: tuple[tuple[str, str, str], ...]
    found: str

    def put_into(self, folder: Path) -> Path:
        """A copy of the device source with the mistake."""
        device = folder / "device"
        shutil.copytree(DEVICE, device)
        for name, before, after in self.edits:
            text = (device / name).read_text()
            assert text.count(before) == 1, f"{name} has {text.count(before)} times: {before}"
            (device / name).write_text(text.replace(before, after))
        return device


FAULTS = [
    Fault(
        "no barrier before the arrival",
        (("handoff.cuh", "bar_sync(Site::kPhaseBar, kConsumerBarrier, kConsumers);\n", "\n"),),
        "Missing: bar_sync before the release|unordered accesses to shared.* at kernel.cuh",
    ),
    Fault(
        "arrival before the barrier",
        (
            ("handoff.cuh", "  bar_sync(Site::kPhaseBar, kConsumerBarrier, kConsumers);\n", ""),
            (
                "handoff.cuh",
                "  if (ctx.thread != 0) return;\n"
                "  fence_gpu(Site::kHandoffFence);\n"
                "  red_relaxed_add(Site::kHandoffArrive, ctx.launch.counter, 1);\n",
                "  if (ctx.thread == 0) fence_gpu(Site::kHandoffFence);\n"
                "  if (ctx.thread == 0) red_relaxed_add(Site::kHandoffArrive, ctx.launch.counter, 1);\n"
                "  bar_sync(Site::kPhaseBar, kConsumerBarrier, kConsumers);\n",
            ),
        ),
        "unordered accesses to work.* Missing: bar_sync before the release",
    ),
    Fault(
        "arrival without a fence",
        (("handoff.cuh", "fence_gpu(Site::kHandoffFence);\n", "\n"),),
        "Missing: fence_gpu before the release",
    ),
    Fault(
        "fence before the other warps have stored",
        (
            (
                "handoff.cuh",
                "  bar_sync(Site::kPhaseBar, kConsumerBarrier, kConsumers);\n",
                "  if (ctx.thread == 0) fence_gpu(Site::kHandoffFence);\n"
                "  bar_sync(Site::kPhaseBar, kConsumerBarrier, kConsumers);\n",
            ),
            ("handoff.cuh", "return;\n  fence_gpu(Site::kHandoffFence);\n", "return;\n"),
        ),
        "Missing: fence_gpu before the release",
    ),
    Fault(
        "polls without acquire",
        (("handoff.cuh", "ld_acquire(Site::kHandoffPoll, ctx.launch.counter)", "ld_relaxed(ctx.launch.counter)"),),
        "Missing: ld_acquire",
    ),
    Fault(
        "arrivals compared as unsigned numbers",
        (("handoff.cuh", "static_cast<i32>(seen - expected) >= 0", "seen >= expected"),),
        "unordered accesses to work|deadlock",
    ),
    Fault(
        "slot released per block instead of per warp",
        (
            ("ring.cuh", "static_cast<u32>(kWarps));", "1);"),
            ("ring.cuh", "if (ctx.lane == 0 && !ctx.aborted) mbar_arrive(", "if (ctx.thread == 0) mbar_arrive("),
        ),
        "unordered accesses to shared .* bulk_copy",
    ),
    Fault(
        "slot released before all lanes have read it",
        (("ring.cuh", "  warp_sync(Site::kSlotWarp);\n", ""),),
        "unordered accesses to shared .* bulk_copy",
    ),
    Fault(
        "slot refilled without a proxy fence",
        (("ring.cuh", "    fence_proxy_async(Site::kProducerFence);\n", ""),),
        "missing fence_proxy_async",
    ),
    Fault(
        "proxy fence before the wait for the empty slot",
        (
            ("ring.cuh", "    fence_proxy_async(Site::kProducerFence);\n", ""),
            (
                "ring.cuh",
                "    if (!wait_empty()) return false;\n",
                "    fence_proxy_async(Site::kProducerFence);\n    if (!wait_empty()) return false;\n",
            ),
        ),
        "missing fence_proxy_async",
    ),
    Fault(
        "parity of the empty slot turned",
        (
            (
                "ring.cuh",
                "empty_barrier(smem, ring.slot), ring.parity ^ 1)",
                "empty_barrier(smem, ring.slot), ring.parity)",
            ),
        ),
        "deadlock",
    ),
    Fault(
        "residual read through the read-only cache",
        (
            (
                "stage.cuh",
                "return ld_global(reinterpret_cast<const f32x4*>(at + pair[step]));",
                "return ld_const(reinterpret_cast<const f32x4*>(at + pair[step]));",
            ),
        ),
        "ld_const",
    ),
    Fault(
        "keys read through the read-only cache",
        (("attend.cuh", "= ld_global(at + (t * 2", "= ld_const(at + (t * 2"),),
        "ld_const",
    ),
    Fault(
        "merge counter never reset",
        (("merge.cuh", "      st_relaxed(counter, 0);", ""),),
        "other results|unordered",
    ),
]
