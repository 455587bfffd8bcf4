"""The folder of a kernel cache: its limit, damaged entries, locks."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernel_caches import built, small

import gf_tvm
from gf_tvm.bundle.format import LIBRARY, checksums, unpack, write
from gf_tvm.errors import BundleError
from gf_tvm.machine.profiles import get_profile
from gf_tvm.on_demand import KernelCache, Wanted, identity
from gf_tvm.on_demand.store import Store

WANTED = small(0)


@contextlib.contextmanager
def in_use(paths: list[Path]) -> Iterator[None]:
    """Shared locks as processes that have loaded these hold them."""
    with contextlib.ExitStack() as stack:
        for path in paths:
            handle = os.open(path, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_SH)
        yield


# ------------------------------------------------------------------------------------------------------------ the limit

ENTRIES = st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=8)


def fill(folder: Path, entries: list[tuple[int, bool]], seed: int) -> list[Path]:
    """Files of these sizes, the last used first."""
    paths = [folder / f"{random.Random(seed + index).getrandbits(64):016x}.gfb" for index in range(len(entries))]
    for age, (path, (size, _)) in enumerate(zip(paths, entries, strict=True)):
        path.write_bytes(b"x" * size)
        os.utime(path, (0, 1e9 - age))
    return paths


@given(entries=ENTRIES, limit=st.integers(1, 120), keep=st.integers(0, 7), seed=st.integers(0, 10**6))
def test_the_least_recently_used_go_until_the_limit_is_met(
    tmp_path_factory: pytest.TempPathFactory, entries: list[tuple[int, bool]], limit: int, keep: int, seed: int
) -> None:
    store = Store(tmp_path_factory.mktemp("store"), limit)
    (store.folder / "notes.txt").write_bytes(b"x" * 500)  # is no entry
    paths = fill(store.folder, entries, seed)
    kept = paths[keep % len(paths)]
    with in_use([path for path, (_, used) in zip(paths, entries, strict=True) if used]):
        store.trim(keep=kept.stem)
    free = [not used and path != kept for path, (_, used) in zip(paths, entries, strict=True)]
    left = [path.exists() for path in paths]
    assert all(exists or may for exists, may in zip(left, free, strict=True))  # none that is in use, nor the new one
    size = sum(size for (size, _), exists in zip(entries, left, strict=True) if exists)
    assert size == store.size()
    gone = [index for index, exists in enumerate(left) if not exists]
    # As many as needed: the limit is met or nothing else may go; with the last one that went, it was not met.
    assert size <= limit or not any(may and exists for may, exists in zip(free, left, strict=True))
    if gone:
        assert size + entries[gone[0]][0] > limit
        # In order: all that may go and were used before the last one that went, went as well.
        assert all(not exists for exists, may in list(zip(left, free, strict=True))[gone[0] :] if may)
    assert (store.folder / "notes.txt").exists()


def test_loading_an_entry_is_using_it(tmp_path: Path) -> None:
    store = Store(tmp_path, 25)
    paths = fill(tmp_path, [(10, False), (10, False), (10, False)], 0)
    assert store.hold(paths[2].stem)
    store.release(paths[2].stem)  # as if its process had ended
    store.trim(keep="")
    assert [path.exists() for path in paths] == [True, False, True]


def test_an_entry_that_is_held_is_not_deleted(tmp_path: Path) -> None:
    store = Store(tmp_path, 1)
    (path,) = fill(tmp_path, [(10, False)], 0)
    assert store.hold(path.stem)
    assert not store.remove(path)
    (entry,) = store.entries()
    assert entry.in_use
    store.release(path.stem)
    (entry,) = store.entries()
    assert not entry.in_use
    assert store.remove(path)
    assert not path.exists()
    assert not store.hold(path.stem)
    assert store.remove(path)  # by somebody else, meanwhile


# ------------------------------------------------------------------------------------------------------ damaged entries


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An entry."""
    path = tmp_path_factory.mktemp("bundle") / "sound.gfb"
    gf_tvm.build(WANTED.workloads, "host", out=path)
    return path.read_bytes()


def same(path: Path, data: bytes, other: bytes) -> bool:
    """Whether two archives say the same, whatever differs in fields that nobody reads."""
    return unpack(path, data) == unpack(path, other)


POISONS = st.one_of(
    st.tuples(st.just("flip"), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 7)), min_size=1, max_size=3)),
    st.tuples(st.just("cut"), st.lists(st.tuples(st.floats(0, 1), st.just(0)), min_size=1, max_size=1)),
    st.tuples(st.just("zero"), st.lists(st.tuples(st.floats(0, 1), st.integers(1, 5000)), min_size=1, max_size=1)),
)


@settings(max_examples=300)
@given(poison=POISONS)
def test_a_damaged_entry_is_never_loaded_but_deleted(
    sound: bytes, tmp_path_factory: pytest.TempPathFactory, poison: tuple[str, list[tuple[float, int]]]
) -> None:
    what, places = poison
    data = bytearray(sound)
    for where, how in places:
        at = round(where * (len(data) - 1))
        if what == "flip":
            data[at] ^= 1 << how
        elif what == "cut":
            del data[at:]
        else:
            data[at : at + how] = bytes(len(data[at : at + how]))
    cache = KernelCache(tmp_path_factory.mktemp("cache"), logs=())
    path = cache.folder / f"{cache._key(WANTED)}.gfb"
    path.write_bytes(data)
    library = cache.find(WANTED)
    if library is None:
        assert bytes(data) != sound
        assert not path.exists()
    else:
        assert same(path, bytes(data), sound)
    cache._store.release(path.stem)


def test_a_sound_bundle_of_something_else_is_not_loaded(sound: bytes, tmp_path: Path) -> None:
    cache = KernelCache(tmp_path, logs=())
    path = cache.folder / f"{cache._key(small(1))}.gfb"
    path.write_bytes(sound)
    assert cache.find(small(1)) is None
    assert not path.exists()


MANIFESTS = [
    {},
    {"kernels": None, "programs": []},
    {"kernels": [], "programs": [], "versions": {}},
    {"kernels": [1], "programs": []},
    {"kernels": [{"key": WANTED.workloads[0].key}], "programs": 3},
    {"kernels": {"key": 1}, "programs": [], "versions": {}},
    {"kernels": [{"key": WANTED.workloads[0].key}], "programs": [], "versions": []},
]


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_a_manifest_that_makes_no_sense_is_a_damage(manifest: dict[str, object], tmp_path: Path) -> None:
    cache = KernelCache(tmp_path, logs=())
    path = cache.folder / f"{cache._key(WANTED)}.gfb"
    files = {LIBRARY: b"code"}
    write(path, {"schema": 1, "sha256": checksums(files), **manifest}, files)
    (entry,) = cache.entries()
    assert entry.damaged or entry.workloads != (WANTED.workloads[0].key,)
    assert cache.find(WANTED) is None


def test_what_this_machine_cannot_load_is_said_once_and_not_built_again(
    sound: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A sound bundle that does not load, as where libraries may not be loaded from the folder for temporary files."""
    cache = KernelCache(tmp_path, logs=())
    path = cache.folder / f"{cache._key(WANTED)}.gfb"
    path.write_bytes(sound)

    def refuse(path: Path) -> None:
        raise BundleError("the kernels do not load")

    monkeypatch.setattr("gf_tvm.bundle.library.load", refuse)
    monkeypatch.setattr("gf_tvm.on_demand.cache._said", set())
    for _ in range(3):
        assert cache.find(WANTED) is None
        cache.request(WANTED, lambda library: pytest.fail("there is none"))
    assert path.exists()
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == ["the kernels do not load"]


def test_a_poisoned_entry_is_built_again(sound: bytes, tmp_path: Path) -> None:
    cache = KernelCache(tmp_path, logs=())
    path = cache.folder / f"{cache._key(WANTED)}.gfb"
    path.write_bytes(sound[:-1000])
    assert built(cache, WANTED).workloads == WANTED.workloads
    assert path.read_bytes() == sound


# --------------------------------------------------------------------------------------------------- the right to build


def test_one_builds_at_a_time_and_what_killed_ones_left_is_deleted(tmp_path: Path) -> None:
    stale = tmp_path / ".0123.gfb-abcdef"
    stale.mkdir()
    (stale / "kernels.so").write_bytes(b"x")
    asked: list[float] = []

    def go_on() -> bool:
        asked.append(time.monotonic())
        return len(asked) < 3

    with Store(tmp_path, 1).building() as first:
        assert first
        assert not stale.exists()
        stale.mkdir()
        with Store(tmp_path, 1).building(go_on) as second:
            assert not second
        assert stale.exists()  # it may be the first one's
    assert len(asked) == 3
    with Store(tmp_path, 1).building() as third:
        assert third
        assert not stale.exists()


@given(ages=st.lists(st.floats(0, 100), max_size=6), older=st.floats(0, 100), used=st.integers(0, 63))
def test_clear_deletes_what_is_old_and_not_in_use(
    tmp_path_factory: pytest.TempPathFactory, ages: list[float], older: float, used: int
) -> None:
    # The clock goes on: what is younger by less becomes as old meanwhile.
    assume(all(age >= older or older - age > 60 / 86400 for age in ages))
    cache = KernelCache(tmp_path_factory.mktemp("cache"), logs=())
    now = time.time()
    paths = [cache.folder / f"{index}.gfb" for index in range(len(ages))]
    for path, age in zip(paths, ages, strict=True):
        path.write_bytes(b"x")
        os.utime(path, (now, now - 86400 * age))
    busy = [path for index, path in enumerate(paths) if used >> index & 1]
    with in_use(busy):
        cleared = cache.clear(86400 * older)
    old = {path for path, age in zip(paths, ages, strict=True) if age >= older}
    assert {entry.path for entry in cleared.removed} == old - set(busy)
    assert {entry.path for entry in cleared.kept} == old & set(busy)
    assert {path for path in paths if path.exists()} == set(paths) - (old - set(busy))


def test_a_folder_that_is_none_is_an_error(tmp_path: Path) -> None:
    assert KernelCache(tmp_path / "missing", logs=()).entries() == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        KernelCache(tmp_path / "file", logs=()).entries()


def test_key_is_the_name_of_the_entry(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path, logs=())
    wanted = Wanted(WANTED.workloads * 2)
    assert cache._key(wanted) == identity.key_of(WANTED, get_profile("host"), ())
