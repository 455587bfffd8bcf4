"""Memory that is lent and comes back: never to two at once, used again, and not much of it kept."""

from __future__ import annotations

import math
import random
import threading
import time

import pytest
import torch

from gf_tvm.forward import arena
from gf_tvm.forward.arena import Arenas


def test_several_threads_never_share() -> None:
    arenas, wrong, most = Arenas(), [], 0
    lent: list[tuple[int, int]] = []
    lock = threading.Lock()

    def work(number: int) -> None:
        nonlocal most
        rng = random.Random(number)
        for turn in range(60):
            elements = rng.choice((1, 5, 64, 1000, 1500, 4096, 100_000))
            with arenas.borrowed(elements) as memory:
                begin = memory.data_ptr()
                with lock:
                    if memory.numel() != elements or any(begin < e and s < begin + 4 * elements for s, e in lent):
                        wrong.append((number, turn))
                    lent.append((begin, begin + 4 * elements))
                    most = max(most, len(lent))
                memory.fill_(100 * number + turn)
                time.sleep(0.0005 * rng.random())
                if not (memory == 100 * number + turn).all():
                    wrong.append((number, turn))
                with lock:
                    lent.remove((begin, begin + 4 * elements))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert most > arena._KEPT
    assert 0 < arenas.free_bytes <= arena._KEPT * 2 * 400_000


def test_memory_is_used_again_where_it_fits() -> None:
    arenas = Arenas()

    def place(elements: int) -> int:
        with arenas.borrowed(elements) as memory:
            assert memory.numel() == elements
            return memory.data_ptr()

    first = place(1000)
    assert arenas.free_bytes == 4000
    assert place(1000) == place(500) == first
    place(499)  # less than half of it: another one
    assert arenas.free_bytes == 4000 + 4 * 499
    place(1001)
    assert arenas.free_bytes == 4000 + 4 * (499 + 1001)
    assert place(600) == first  # of those that fit, the smallest
    for elements in (10**4, 10**5, 10**6, 10**7):
        place(elements)
    assert arenas.free_bytes == 4 * (10**4 + 10**5 + 10**6 + 10**7)
    arenas.clear()
    assert arenas.free_bytes == 0


def test_it_comes_back_after_an_error() -> None:
    arenas = Arenas()
    with pytest.raises(KeyError), arenas.borrowed(100):
        raise KeyError
    assert arenas.free_bytes == 400


@pytest.mark.parametrize("advice", [arena._ADVICE, None, -1])
def test_large_memory_is_usable_whatever_the_system_says(advice: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "_ADVICE", advice)
    elements = 3 * 2**20 // 2 + 3
    with Arenas().borrowed(elements) as memory:
        memory.fill_(math.nan)
        memory.copy_(torch.arange(elements))
        assert memory[-1] == elements - 1
