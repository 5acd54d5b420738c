"""Stage 7, on request: transformers on the same GPU, a static cache under torch.compile(mode="reduce-overhead")."""

from __future__ import annotations

from statistics import median
from typing import Any

from flashformer.model.random import shape_config

from .device import note_clocks, open_gpu
from .models import LARGE, SMALL
from .record import Clock, Record, spread

CONTEXT, NEW, REPEATS = 32, 64, 5


def run(record: Record, clock: Clock) -> None:
    open_gpu(record).close()
    try:
        import torch
        import transformers
    except ImportError as error:
        record.skip(f"transformers cannot be imported: {error}")
        return
    record.about(torch=torch.__version__, transformers=transformers.__version__)
    for shape in (SMALL, LARGE):
        clock.require(shape, 60)
        with torch.no_grad():
            _one(record, torch, transformers, shape)
        torch.cuda.empty_cache()
    note_clocks(record, "clocks_after")


def _one(record: Record, torch: Any, transformers: Any, shape: str) -> None:
    """us of one token behind CONTEXT cached ones; greedy ids with and without compiling must agree."""
    torch.manual_seed(0)
    keys = {k: v for k, v in shape_config(shape).items() if k not in ("architectures", "model_type", "torch_dtype")}
    config = transformers.LlamaConfig(**keys)
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    cache = transformers.StaticCache(config=config, max_cache_len=CONTEXT + 2 * NEW)
    ids = torch.randint(0, config.vocab_size, (1, CONTEXT), device="cuda")

    def step(token: Any, position: Any) -> Any:
        out = model(token, past_key_values=cache, cache_position=position, use_cache=True)
        return out.logits[:, -1:].argmax(-1)

    def text(once: Any) -> tuple[list[int], list[float]]:
        token = step(ids, torch.arange(CONTEXT, device="cuda"))
        found, us = [], []
        for i in range(NEW):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            token = once(token, torch.tensor([CONTEXT + i], device="cuda")).clone()
            end.record()
            end.synchronize()
            us.append(begin.elapsed_time(end) * 1e3)
            found.append(int(token))
        return found, us

    compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    expected, _ = text(step)
    text(compiled)  # compiles and records
    name = f"transformers {shape} bf16, {CONTEXT} cached"
    runs = [text(compiled) for _ in range(REPEATS)]
    first = [found[0] for found, _ in runs]
    record.check(name, set(first) == {expected[0]}, "the first token, compiled and not; later ones may differ in bf16")
    us = [t for _, times in runs for t in times]
    record.speed(name, median(us), "us", check=name, shown=True, us=spread(us))
