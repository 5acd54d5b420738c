"""What a request returned and how long it took."""

from __future__ import annotations

import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

from .logprobs import TokenLogprobs


@dataclass(frozen=True)
class Timing:
    """Times of one request as its caller saw them, without the time the caller itself spent between pieces."""

    ttft_ms: float  # from the request, encoding included, to the first token
    n_tokens: int
    tok_s: float | None  # tokens after the first per second; None with fewer than two
    p50_ms: float | None  # per token after the first
    p99_ms: float | None
    gb_s: float | None  # weights and KV read by these tokens per second, 1e9 bytes


@dataclass(frozen=True)
class Output:
    text: str  # without the stop string; "" where the model has no tokenizer
    token_ids: list[int]  # all new tokens; the one that ended the text is the last
    prompt_token_ids: list[int]
    seed: int
    finish_reason: str  # "stop" | "length" | "cancelled"
    timing: Timing
    logprobs: list[TokenLogprobs] | None = None  # one per new token, where asked for
    cached_tokens: int = 0  # of the prompt, found in the slot's cache and not computed again
    cache_miss: str | None = None  # why no more of it was; None where all that could be was
    stop: str | None = None  # the stop string that ended the text


def percentile(ordered: list[float], share: float) -> float:
    """Nearest rank in an ascending, non-empty list."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def make_timing(ttft_ns: int, step_ns: list[int], n_bytes: int) -> Timing:
    """`step_ns`: one entry per token after the first. `n_bytes`: read by all of these together."""
    n = len(step_ns) + (ttft_ns > 0)
    if not step_ns:
        return Timing(ttft_ns / 1e6, n, None, None, None, None)
    total, ordered = max(sum(step_ns), 1), sorted(ns / 1e6 for ns in step_ns)
    return Timing(
        ttft_ms=ttft_ns / 1e6,
        n_tokens=n,
        tok_s=len(step_ns) * 1e9 / total,
        p50_ms=percentile(ordered, 0.5),
        p99_ms=percentile(ordered, 0.99),
        gb_s=n_bytes / total,
    )


def peak_rss_bytes() -> int:
    """Most memory this process ever had resident.

    getrusage would also count what the parent had at fork, so the kernel's own mark is preferred.
    """
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found[1]) << 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def stats_line(
    prompt_tokens: int, timing: Timing, *, fits_in_cache: bool, measured_gb_s: float | None, peak_bytes: int
) -> str:
    """The line after a run. Parts that were not measured are left out."""
    parts = [f"prompt {prompt_tokens} tok {timing.ttft_ms:.0f} ms"]
    tokens = f"{timing.n_tokens} tok"
    if timing.tok_s is not None:
        tokens += f" {timing.tok_s:.1f} tok/s (p50 {timing.p50_ms:.1f} p99 {timing.p99_ms:.1f} ms)"
    parts.append(tokens)
    if timing.gb_s is not None:
        speed = f"{timing.gb_s:.1f} GB/s"
        if fits_in_cache:
            speed += ", weights fit in cache"
        elif measured_gb_s:
            speed += f" = {100 * timing.gb_s / measured_gb_s:.0f}% of measured {measured_gb_s:.1f}"
        parts.append(speed)
    parts.append(f"peak {peak_bytes / 2**30:.2f} GiB")
    return " | ".join(parts)
