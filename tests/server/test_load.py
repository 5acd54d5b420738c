"""A short run of benchmarks/serve_load.py: clients of all manners get what they should and leave nothing behind."""

from __future__ import annotations

import asyncio
import gc
import re
from collections import Counter
from pathlib import Path
from random import Random

from serving import CHATS, load, running
from threads import until
from wire.client import Address
from wire.load import Ask, asks, run_stage

import flashformer as ff
from flashformer.engine.batch import Sequence
from flashformer.server.bridge import Bridge
from flashformer.server.work import Work

N_CLIENTS, N_REQUESTS, N_ROUNDS = 64, 128, 3
MOST_GROWN_MIB = 8  # between rounds that do the same


def n_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def rss_mib() -> float:
    found = re.search(r"^VmRSS:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) / 1024


def n_left_over() -> int:
    """Of requests, in the whole process."""
    gc.collect()
    return sum(isinstance(one, Bridge | Work | Sequence) for one in gc.get_objects())


def answer(llm: ff.LLM, ask: Ask) -> str:
    settings = {name: value for name, value in ask.body.items() if name not in ("messages", "prompt")}
    if ask.path == CHATS:
        return llm.chat(ask.body["messages"], **settings).text
    return llm.generate(ask.body["prompt"], **settings).text


def test_clients_of_all_manners_leave_nothing_behind(folder: Path, tmp_path: Path) -> None:
    known, outcomes, grown = asks(n_tokens=40), Counter[str](), []
    with load(folder, streams=4) as llm:
        expected = [answer(llm, ask) for ask in known]
        with running(llm, tmp_path, max_waiting=48, buffer_bytes=4096) as here:
            address, objects = Address(str(here.path)), n_left_over()
            files = n_files()  # of tests before, none are closed from here on
            for seed in range(N_ROUNDS):
                size = {"n_clients": N_CLIENTS, "n_requests": N_REQUESTS}
                found = asyncio.run(run_stage(address, known, expected, Random(seed), **size))
                here.idle()
                until(lambda: not here.server.server_state.connections)
                assert found.n_differing == 0
                outcomes += found.outcomes
                gc.collect()
                grown.append(rss_mib())
            until(lambda: n_files() <= files)
            until(lambda: n_left_over() <= objects)
            assert all(slot.is_free for slot in llm._slots._slots)
    assert outcomes.total() == N_ROUNDS * N_REQUESTS
    assert set(outcomes) == {"200", "429", "left before one", "left in an answer"}
    assert outcomes["200"] > N_ROUNDS * N_REQUESTS / 4
    assert grown[-1] - grown[0] < MOST_GROWN_MIB
