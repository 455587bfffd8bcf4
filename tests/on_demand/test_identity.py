"""The key of an entry changes with everything that decides how it is compiled, and with nothing else."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from odd_programs import OddProgram
from strategies import geometries

from gf_tvm.core.geometry import Geometry
from gf_tvm.core.workload import DTYPES, KERNELS, Workload
from gf_tvm.errors import BuildError
from gf_tvm.farm.wheel import code_of
from gf_tvm.machine.profiles import DeviceProfile, get_profile, list_profiles
from gf_tvm.on_demand import identity
from gf_tvm.on_demand.identity import CODE, CODE_MODULE, Wanted, code_digest, key_of, logs_digest

PROFILE = get_profile("x86-64-v3")
SMALL = Wanted((Workload("filter_input", Geometry(1, 2, 2, 6, 6, 3, 2)),))
WORKLOADS = st.builds(
    Workload, st.sampled_from(sorted(KERNELS)), geometries(smallest_n=1), st.sampled_from(sorted(DTYPES))
)
PROGRAMS = st.builds(OddProgram, st.text("abc", min_size=1, max_size=3), st.just("fail"))
WANTED = st.builds(
    lambda workloads, programs: (tuple(workloads), tuple(programs)),
    st.lists(WORKLOADS, max_size=3),
    st.lists(PROGRAMS, max_size=3),
).filter(lambda parts: parts[0] or parts[1])


@given(first=WANTED, second=WANTED, seed=st.integers(0, 99))
def test_keys_are_equal_where_the_same_is_wanted(first: Any, second: Any, seed: int) -> None:
    def shuffled(items: tuple[Any, ...]) -> tuple[Any, ...]:
        choice = random.Random(seed)
        twice = [*items, *choice.sample(items, choice.randint(0, len(items)))]
        choice.shuffle(twice)
        return tuple(twice)

    key = key_of(Wanted(*first), PROFILE)
    assert key_of(Wanted(*map(shuffled, first)), PROFILE) == key
    same = [{part.key for part in parts} for parts in first] == [{part.key for part in parts} for parts in second]
    assert (key_of(Wanted(*second), PROFILE) == key) is same


def changed(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, str):
        return f"{value} " if not value.startswith("{") else json.dumps({**json.loads(value), "opt-level": 1})
    if isinstance(value, tuple):
        return (*value, "sse9")
    return 1 if value is None else value + 1


@pytest.mark.parametrize("field", [field.name for field in fields(DeviceProfile) if field.name != "gpu"])
def test_key_changes_with_every_field_of_the_profile(field: str) -> None:
    other = replace(PROFILE, **{field: changed(getattr(PROFILE, field))})
    assert key_of(SMALL, other) != key_of(SMALL, PROFILE)


def test_keys_of_all_profiles_differ() -> None:
    profiles = [profile for profile in list_profiles() if profile.gpu is None]
    assert len({key_of(SMALL, profile) for profile in profiles}) == len(profiles) > 2


@pytest.mark.parametrize("name", ["gf_tvm", "tvm", "tvm_ffi"])
def test_key_changes_with_each_version(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    before, versions = key_of(SMALL, PROFILE), identity._versions()
    monkeypatch.setattr(identity, "_versions", lambda: {**versions, name: versions[name] + "1"})
    assert key_of(SMALL, PROFILE) != before


def test_key_changes_with_the_format(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of(SMALL, PROFILE)
    monkeypatch.setattr(identity, "FORMAT", "gf_tvm.kernels/0")
    assert key_of(SMALL, PROFILE) != before


#: What may happen to one of some files.
CHANGES: dict[str, Callable[[dict[str, bytes], str], None]] = {
    "altered": lambda files, name: files.update({name: files[name] + b"\n"}),
    "removed": lambda files, name: files.pop(name) and None,
    "renamed": lambda files, name: files.update({f"{name}x.jsonl": files.pop(name)}),
    "added": lambda files, name: files.update({"new.jsonl": b""}),
}


@given(data=st.data(), change=st.sampled_from(sorted(CHANGES)))
def test_key_changes_with_each_file_of_the_code(data: st.DataObject, change: str) -> None:
    files = code_of(f"gf_tvm.{name}" for name in CODE)
    before, digest = key_of(SMALL, PROFILE), code_digest()
    CHANGES[change](files, data.draw(st.sampled_from(sorted(files))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identity, "code_of", lambda packages: dict(files))
        patch.setattr(identity, "code_digest", code_digest.__wrapped__)
        assert identity.code_digest() != digest
        assert key_of(SMALL, PROFILE) != before


@given(
    logs=st.dictionaries(st.sampled_from(["a.jsonl", "b.jsonl", "c.jsonl"]), st.binary(max_size=3), min_size=1),
    data=st.data(),
    change=st.sampled_from(sorted(CHANGES)),
)
def test_key_changes_with_each_tuning_log(
    tmp_path_factory: pytest.TempPathFactory, logs: dict[str, bytes], data: st.DataObject, change: str
) -> None:
    first, again, second = (tmp_path_factory.mktemp("logs") for _ in range(3))
    altered = dict(logs)
    CHANGES[change](altered, data.draw(st.sampled_from(sorted(logs))))
    for folder, files in ((first, logs), (again, logs), (second, altered)):
        for device, name, content in [(PROFILE.name, *file) for file in files.items()]:
            (folder / device).mkdir(exist_ok=True)
            (folder / device / name).write_bytes(content)
    # Those of other devices count for nothing.
    (again / "rpi4").mkdir()
    (again / "rpi4/a.jsonl").write_bytes(b"1")
    key = key_of(SMALL, PROFILE, [first])
    assert key_of(SMALL, PROFILE, [again]) == key
    assert key_of(SMALL, PROFILE, [second]) != key
    assert key_of(SMALL, PROFILE) != key
    # The first folder that has a log is the one that counts.
    assert key_of(SMALL, PROFILE, [first, second]) != key_of(SMALL, PROFILE, [second, first])


def test_shipped_logs_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = key_of(SMALL, PROFILE)
    monkeypatch.setattr(identity, "shipped_logs", lambda: tmp_path)
    assert key_of(SMALL, PROFILE) != before
    assert logs_digest(tmp_path, PROFILE.name) == logs_digest.__wrapped__(tmp_path, "rpi4")  # both without any


#: Of gf_tvm: what the build imports besides the code that counts. None of it decides what is compiled.
BESIDES = {"__init__", "_lazy", "_version", "errors", "files", "farm", "on_demand", "tuning_logs"}


def test_a_build_imports_no_code_that_the_key_does_not_have(tmp_path: Path) -> None:
    """By a build of a kernel and of a chain's programs, in a fresh process."""
    data = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PICKLED], capture_output=True, text=True, check=True, cwd=tmp_path
    ).stdout
    script = BUILDS.format(data=data.strip(), out=str(tmp_path / "out.gfb"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    imported = json.loads(done.stdout.splitlines()[-1])
    top = {name: [*name.split("."), "__init__"][1] for name in imported}
    tops = set(top.values())
    assert {"kernels", "codegen", "schedules", "chains", "building", "tuning"} <= tops  # it was a whole build
    assert tops - BESIDES <= {*CODE, CODE_MODULE.removesuffix(".py")}
    files = code_of(f"gf_tvm.{name}" for name in CODE)
    for name in imported:
        if top[name] in CODE:
            path = name.replace(".", "/")
            assert {f"{path}.py", f"{path}/__init__.py"} & set(files), name


#: Prints what a model's chain wants.
PICKLED = """
import pickle, torch, gf_tvm
from torch import nn
from gf_tvm.core.geometry import Geometry
from gf_tvm.core.workload import Workload
from gf_tvm.on_demand import Wanted
model = gf_tvm.filter_model(nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3)), 2, last=2, chain=True)
model(torch.randn(2, 2, 8, 8)).sum().backward()
programs = gf_tvm.programs_of(model)
assert programs
print(pickle.dumps(Wanted((Workload("backward", Geometry(1, 2, 2, 6, 6, 3, 2)),), tuple(programs))).hex())
"""
#: Builds it, and prints which modules of gf_tvm that took.
BUILDS = """
import json, pickle, sys
from gf_tvm.building import build
wanted = pickle.loads(bytes.fromhex({data!r}))
build(wanted.workloads, "host", out={out!r}, programs=wanted.programs)
print(json.dumps(sorted(name for name in sys.modules if name.partition(".")[0] == "gf_tvm")))
"""


def test_code_is_found_where_it_lies() -> None:
    files = code_of(f"gf_tvm.{name}" for name in CODE)
    for name in ("kernels/cpu/sweep.py", "codegen/openmp.c", "schedules/cpu.py", "chains/compile/emit_backward.py"):
        assert f"gf_tvm/{name}" in files


def test_nothing_is_wanted() -> None:
    with pytest.raises(BuildError, match="no workloads and no programs"):
        Wanted()


def test_the_key_needs_neither_tvm_nor_pytorch() -> None:
    code = """
import sys
from gf_tvm.core.geometry import Geometry
from gf_tvm.core.workload import Workload
from gf_tvm.machine.profiles import get_profile
from gf_tvm.on_demand.identity import Wanted, key_of
print(key_of(Wanted((Workload("filter_input", Geometry(1, 2, 2, 6, 6, 3, 2)),)), get_profile("x86-64-v3")))
print(sorted({"tvm", "torch", "tvm_ffi"} & set(sys.modules)))
"""
    key, heavy = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert key == key_of(SMALL, PROFILE)  # of another process, which hashes strings differently
    assert heavy == "[]"
