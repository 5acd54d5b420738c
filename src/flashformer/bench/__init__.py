"""A loaded model in, one measurement per test out; the probe runs in between, in the same process."""

from .decode import BenchOptions, DecodeBench, bench_decode
from .origin import commit

__all__ = ["BenchOptions", "DecodeBench", "bench_decode", "commit"]
