"""A loaded model in, one measurement per test out; the probe runs in between, in the same process."""

from .decode import BenchOptions, BenchResult, bench_decode, bench_prefill
from .origin import commit
from .trace import Trace, trace_forward

__all__ = ["BenchOptions", "BenchResult", "Trace", "bench_decode", "bench_prefill", "commit", "trace_forward"]
