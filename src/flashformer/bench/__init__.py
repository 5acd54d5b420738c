"""A loaded model in, one measurement per test out; the probe runs in between, in the same process."""

from .decode import BenchOptions, BenchResult, bench_decode, bench_prefill
from .origin import commit

__all__ = ["BenchOptions", "BenchResult", "bench_decode", "bench_prefill", "commit"]
