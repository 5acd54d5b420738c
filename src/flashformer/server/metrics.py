"""What /metrics says: vLLM's names after the prefix `flashformer:`, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
PREFIX = "flashformer:"
SECONDS = (
    *(50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 100e-3, 250e-3, 500e-3),
    *(1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0),
)
REASONS = ("stop", "length", "abort", "error")


@dataclass(frozen=True)
class Live:
    """What is asked when /metrics is: how things stand."""

    running: Callable[[], float]
    waiting: Callable[[], float]
    kv_share: Callable[[], float]
    gb_s: Callable[[], float]
    measured_gb_s: Callable[[], float]


class Metrics:
    """Of one server. May be counted from any thread."""

    def __init__(self, model_name: str, live: Live) -> None:
        self._registry = CollectorRegistry()
        self._model = model_name
        ProcessCollector(registry=self._registry)
        gauges = {
            "num_requests_running": ("requests that have a slot", live.running),
            "num_requests_waiting": ("requests that wait for a slot", live.waiting),
            "kv_cache_usage_perc": ("share of the KV cache that running requests fill, 1 is all", live.kv_share),
            "gb_per_s": ("weights and KV read per second by the latest running request, 1e9 bytes", live.gb_s),
            "measured_gb_per_s": ("read bandwidth as measured here; 0: weights fit in cache", live.measured_gb_s),
        }
        for name, (says, read) in gauges.items():
            gauge = Gauge(PREFIX + name, says, ["model_name"], registry=self._registry)
            gauge.labels(model_name).set_function(read)
        self.prompt_tokens = self._counter("prompt_tokens", "tokens of prompts")
        self.generation_tokens = self._counter("generation_tokens", "tokens made")
        self.prefix_queries = self._counter("prefix_cache_queries", "tokens of prompts looked for in the cache")
        self.prefix_hits = self._counter("prefix_cache_hits", "tokens of prompts found in the cache")
        self.first_token = self._histogram("time_to_first_token_seconds", "from the request to its first token")
        self.next_token = self._histogram("inter_token_latency_seconds", "from one token to the next")
        self.per_token = self._histogram("time_per_output_token_seconds", "mean of a request, after its first token")
        self.latency = self._histogram("e2e_request_latency_seconds", "from the request to the end of its answer")
        self.queue = self._histogram("request_queue_time_seconds", "from the request until it had a slot")
        self._ends = Counter(
            f"{PREFIX}request_success", "answers by how they ended", ["model_name", "finished_reason"],
            registry=self._registry,
        )  # fmt: skip
        for reason in REASONS:
            self._ends.labels(model_name, reason)

    def end(self, reason: str) -> None:
        """One of REASONS."""
        self._ends.labels(self._model, reason).inc()

    def render(self) -> bytes:
        return generate_latest(self._registry)

    def _counter(self, name: str, says: str) -> Counter:
        return Counter(PREFIX + name, says, ["model_name"], registry=self._registry).labels(self._model)

    def _histogram(self, name: str, says: str) -> Histogram:
        labels = ["model_name"]
        return Histogram(PREFIX + name, says, labels, buckets=SECONDS, registry=self._registry).labels(self._model)
