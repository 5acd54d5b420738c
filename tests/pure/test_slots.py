"""Which slot a request gets, and whose turn it is, without a model."""

from __future__ import annotations

import os
import signal
import threading
import time

import numpy as np
import pytest
from threads import joined, started, until

import flashformer as ff
from flashformer.engine.slots import Slot, Slots, Turns, _Lease
from flashformer.errors import RequestError

IDS = np.arange(8, dtype=np.int32)


def acquire(slots: Slots, ids: np.ndarray = IDS, reusable: int = 7) -> Slot:
    slot = slots.acquire(ids, reusable)
    assert slot is not None
    return slot


def hold(slot: Slot, *tokens: int) -> None:
    slot.ids[: len(tokens)], slot.held.n = tokens, len(tokens)


def test_waiting_for_a_slot_has_a_bound() -> None:
    slots = Slots(1, 8, 0.05)
    held: list[Slot] = []
    joined(started(lambda: held.append(acquire(slots))))
    with pytest.raises(ff.RequestError, match="no slot became free"):
        slots.acquire(IDS, 7)
    slots.release(held[0])
    assert acquire(slots).index == 0
    assert slots.n_waiting == 0


def test_slots_are_given_in_order_of_arrival() -> None:
    slots, order = Slots(2, 8, 60), list[int]()
    first = [acquire(slots), acquire(slots)]
    threads: list[threading.Thread] = []
    for i in range(24):

        def ask(i: int = i) -> None:
            slot = acquire(slots)
            order.append(i)
            slots.release(slot)

        threads += started(ask)
        until(lambda n=i + 1: slots.n_waiting == n)  # type: ignore[misc]
    slots.release(first[0])
    joined(threads)
    assert order == list(range(24))


def test_a_request_that_is_cancelled_while_it_waits_leaves_the_line() -> None:
    slots, found, gone = Slots(1, 8, 60), list[object](), threading.Event()
    slot = acquire(slots)
    threads = started(lambda: found.append(slots.acquire(IDS, 7, gone.is_set)))
    until(lambda: slots.n_waiting == 1)
    threads += started(lambda: found.append(acquire(slots)))
    until(lambda: slots.n_waiting == 2)
    gone.set()
    slots.wake()
    joined(threads[:1])
    assert found == [None]
    slots.release(slot)
    joined(threads)
    assert found == [None, slot]


def test_a_request_takes_the_slot_that_shares_the_longest_prefix() -> None:
    slots = Slots(3, 8, 1)
    a, b, c = (acquire(slots) for _ in range(3))
    hold(a, 0, 1, 2, 9)
    hold(b, 0, 1, 2, 3, 4, 9)
    hold(c, 5)
    for slot in (c, b, a):
        slots.release(slot)
    taken = acquire(slots)
    assert (taken, taken.n) == (b, 5)
    taken = acquire(slots)
    assert (taken, taken.n) == (a, 3)
    assert taken.miss == "5 tokens of the prompt are in slot 1, which runs another request"
    slots.release(b)
    assert acquire(slots, IDS[:4], 3) is b
    assert b.n == 3  # the last token is computed again: it gives the logits


def test_a_small_shared_prefix_does_not_cost_a_long_cache() -> None:
    """Most prompts share their BOS: that alone does not make a conversation give way to another."""
    slots = Slots(2, 8, 1)
    a, b = acquire(slots), acquire(slots)
    hold(a, 0, 9, 9, 9, 9)
    slots.release(a)
    slots.release(b)
    assert acquire(slots) is b
    hold(b, 0, 8, 8)
    slots.release(b)
    taken = acquire(slots)
    assert (taken, taken.n) == (a, 1)  # the least recently used, and what it shares is used


def test_of_slots_that_would_lose_much_none_is_chosen_for_what_it_shares() -> None:
    slots = Slots(3, 100, 1)
    a, b, c = (acquire(slots) for _ in range(3))
    hold(a, *range(6), *[9] * 20)  # shares six, would lose twenty
    hold(b, 0, 1, 2, 3)
    hold(c, 9)
    for slot in (a, b, c):
        slots.release(slot)
    assert acquire(slots) is b
    assert b.miss == "6 tokens of the prompt are in slot 0, which keeps its 26 tokens for what they serve"


def test_turns_are_taken_in_the_order_in_which_they_are_asked_for() -> None:
    turns, order = Turns(), list[int]()
    turns.lock.acquire()
    threads: list[threading.Thread] = []
    for i in range(16):
        threads += started(lambda i=i: turns.take(order.append, i))  # type: ignore[misc]
        until(lambda n=i + 1: turns.n_waiting == n)  # type: ignore[misc]
    turns.lock.release()
    joined(threads)
    assert order == list(range(16))
    assert turns.n_waiting == 0


def test_threads_that_ask_again_at_once_go_round() -> None:
    """A turn lasts until all others stand in line, so that the order is known: that of the first round, for ever."""
    turns, order, left = Turns(), list[int](), [40] * 5

    def turn(me: int) -> None:
        order.append(me)
        left[me] -= 1
        others = sum(n > 0 for who, n in enumerate(left) if who != me)
        until(lambda: turns.n_waiting == others)

    def loop(me: int) -> None:
        for _ in range(40):
            turns.take(turn, me)

    joined(started(*(lambda me=me: loop(me) for me in range(5))))  # type: ignore[misc]
    assert sorted(order[:5]) == list(range(5))
    assert order == order[:5] * 40
    assert turns.n_waiting == 0


def test_a_place_that_was_left_behind_is_passed_over() -> None:
    turns, done = Turns(), list[int]()
    turns._line.append(threading.Lock())  # as of a thread that was interrupted on its way out
    joined(started(lambda: turns.take(done.append, 1), lambda: turns.take(done.append, 2)))
    assert sorted(done) == [1, 2]
    assert turns.n_waiting == 0


def test_an_error_in_a_turn_passes_the_turn_on() -> None:
    turns, done = Turns(), list[int]()

    def fail() -> None:
        until(lambda: turns.n_waiting > 0)
        raise KeyError

    def ask() -> None:
        with pytest.raises(KeyError):
            turns.take(fail)
        done.append(1)

    threads = started(ask)
    until(turns.lock.locked)
    threads += started(lambda: turns.take(done.append, 2))
    joined(threads)
    assert sorted(done) == [1, 2]


def test_a_slot_whose_holder_is_gone_is_free() -> None:
    """An interrupt can come between taking a slot and the block that gives it back."""
    slots = Slots(1, 16, 0.1)
    lease = _Lease()
    assert slots.acquire(IDS, 7, lease=lease) is not None
    with pytest.raises(RequestError):
        slots.acquire(IDS, 7)
    del lease
    assert acquire(slots).index == 0


def test_c51_close_in_a_forked_child_waits_for_nobody() -> None:
    slots, turns = Slots(1, 16, 1.0), Turns()
    with turns.lock, slots._lock:
        pid = os.fork()
        if pid == 0:  # the locks are held by a thread that is not here
            signal.alarm(5)
            threading.Thread(target=lambda: (turns.close(), slots.close(), os._exit(0))).start()
            time.sleep(10)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
