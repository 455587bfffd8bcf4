"""A log is data: of MetaSchedule's traces it has only what rearranges loops."""

from __future__ import annotations

import copy
import json
import random
import string
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from farm_helpers import small_workload
from hypothesis import given
from hypothesis import strategies as st

from gf_tvm.building import build
from gf_tvm.errors import LogError
from gf_tvm.machine.profiles import get_profile
from gf_tvm.tuning.log import LogFolder, Record, identity_of, log_path, read_log, shipped_logs
from gf_tvm.tuning.merge import merge
from gf_tvm.tuning.search import MetaScheduleSearch
from gf_tvm.tuning.task import Candidate, WorkloadTask
from gf_tvm.tuning.traces import MAX_INSTRUCTIONS, check_trace

#: LLVM IR that a kernel would call; that it is compiled at all is what must not happen.
IR = "define void @f() { ret void }"

#: The least that schedules `weight_grad`, with one of each kind of instruction that has a value.
SOUND: list[Any] = [
    [
        ["GetSBlock", [], ["grad_w", "main"], ["b0"]],
        ["GetSBlock", [], ["root", "main"], ["b1"]],
        ["GetLoops", ["b0"], [], ["l2", "l3", "l4"]],
        ["SamplePerfectTile", ["l2"], [2, 64], ["v5", "v6"]],
        ["Split", ["l2", "v5", "v6"], [True, False], ["l7", "l8"]],
        ["Split", ["l3", "None", 4], [1, 0], ["l9", "l10"]],
        ["Reorder", ["l7", "l9", "l8", "l10"], [], []],
        ["CacheWrite", ["b0", []], [0, "global"], ["b11"]],
        ["ReverseComputeAt", ["b11", "l9"], [1, -1], []],
        ["Annotate", ["b0", '"SSRSRS"'], ["meta_schedule.tiling_structure"], []],
        ["SampleCategorical", [], [[0, 16, 64, 512], [0.25, 0.25, 0.25, 0.25]], ["v12"]],
        ["Annotate", ["b1", "v12"], ["meta_schedule.unroll_explicit"], []],
        ["EnterPostproc", [], [], []],
        ["Unannotate", ["b1"], ["meta_schedule.unroll_explicit"], []],
        ["Parallel", ["l7"], [], []],
        ["Annotate", ["l7", 64], ["pragma_auto_unroll_max_step"], []],
        ["Vectorize", ["l10"], [], []],
    ],
    [[3, [4, 1]], [10, 2]],
]

#: Scheduling primitives of TVM that put foreign code into a kernel, undo its checks, or load objects; or that no rule
#: for CPUs uses.
OTHERS = (
    *("Tensorize", "Blockize", "TransformLayout", "TransformBlockLayout", "SetAxisSeparator", "SetScope"),
    *("UnsafeSetDType", "UnsafeHideBufferAccess", "AnnotateBufferAccess", "StorageAlign", "CacheIndex", "CacheInplace"),
    *("ReindexCacheRead", "ReindexCacheWrite", "ReIndex", "CacheRead", "Bind", "Unroll", "DecomposePadding"),
    *("PadEinsum", "RollingBuffer", "LoopPartition", "Merge", "ReadAt", "WriteAt", "SamplePartitionedTile"),
    *("ReorderBlockIterVar", "FuseReductionEpilogue", "AddUnitLoop", "GetOutputBlocks", "annotate", "Annotate "),
)
#: Annotations that TVM's passes and code generators act on.
KEYS = (
    *(
        "pragma_import_llvm",
        "pragma_import_c",
        "pragma_scope",
        "pragma_debug_skip_region",
        "pragma_loop_partition_hint",
    ),
    *("pragma_parallel_launch_point", "pragma_unroll_explicit ", "PRAGMA_IMPORT_LLVM", "import_llvm", "pragma_asm"),
    *("software_pipeline_stage", "software_pipeline_order", "buffer_dim_align", "tir.hash_common_subexpr"),
    *("meta_schedule.auto_tensorize", "meta_schedule.auto_tensorize_init", "meta_schedule.cooperative_fetch"),
    *("script_parsing_detect_access", "warp_execution", "double_buffer_scope", "extern_scope", "compute_scope"),
)
VALUES = (
    IR,
    f'"{IR}"',
    f'"{"x" * 99}"',
    '{"root": 0, "nodes": []}',
    None,
    -1,
    1 << 40,
    1.5,
    True,
    [],
    {},
    [IR],
    "b0",
    "",
)


def instructions(rng: random.Random) -> Iterator[list[Any]]:
    """Instructions, each of which no log may have."""
    for name in OTHERS:
        yield [name, ["b0"], [], []]
    for key in (*KEYS, *("".join(rng.choices(string.ascii_letters + "_.", k=rng.randint(0, 24))) for _ in range(20))):
        for value in VALUES:
            yield ["Annotate", ["l7", value], [key], []]
    for key in ("pragma_auto_unroll_max_step", "pragma_unroll_explicit", "meta_schedule.tiling_structure"):
        for value in VALUES:
            if value is not True:  # 1 in JSON's other spelling
                yield ["Annotate", ["l7", value], [key], []]
    for value in VALUES:
        yield ["Annotate", ["l7", 1], [value], []]
        yield ["Unannotate", ["l7"], [value], []]
        yield ["GetSBlock", [], ["c", value], ["b20"]]
        yield ["CacheWrite", ["b0", []], [0, value], ["b20"]]
        yield ["Split", ["l7", 2, 2], [True, value if value is not None else True], ["l20", "l21"]]
        yield ["Fuse", ["l7", [value]], [1], ["l20"]]
        yield ["GetLoops", [{"a": value}], [], ["l20"]]
        yield [value, ["b0"], [], []]
        if value != "b0":
            yield ["Parallel", [value], [], []]
            yield ["GetLoops", ["b0"], [], [value]]
            yield ["CacheWrite", ["b0", [value]], [0, "global"], ["b20"]]
    yield ["Annotate", ["l7"], ["pragma_unroll_explicit"], []]
    yield ["Annotate", ["l7", 1, 1], ["pragma_unroll_explicit"], []]
    yield ["EnterPostproc", [IR], [], []]
    yield ["Parallel", ["l7"], [IR], []]
    yield ["GetLoops", ["b0"] * 65, [], []]
    yield ["Parallel", ["l7"], []]


def traces() -> list[Any]:
    rng = random.Random(1)
    bad: list[Any] = []
    for instruction in instructions(rng):
        changed = copy.deepcopy(SOUND)
        changed[0].insert(rng.randint(11, len(changed[0])), instruction)
        bad.append(changed)
    bad += [
        [SOUND[0], [decision]] for decision in ([0, [1]], [99, 1], [3, "x"], [3, [IR]], [3, {}], 3, [3], [3, [[1]]])
    ]
    bad += [[], [[]], [[], [], []], {}, None, IR, [{}, []], [[1], []], [[None], []], [[], [[0, 1]]]]
    bad.append([[SOUND[0][0]] * (MAX_INSTRUCTIONS + 1), []])
    return bad


def line_of(value: dict[str, Any]) -> bytes:
    """A line of a log with a checksum that fits: what a foreign program can write."""
    body = json.dumps(value, separators=(",", ":")).encode()
    return body[:-1] + b',"crc":"%08x"}\n' % zlib.crc32(body)


@pytest.fixture
def forged(tmp_path: Path) -> Callable[[Any], Path]:
    """Writes a log of a small convolution with a winner that has this trace -> the folder of logs."""
    workload, profile = small_workload(), get_profile("host")
    identity = identity_of(workload, profile)

    def forge(trace: Any) -> Path:
        folder = tmp_path / "foreign"
        path = log_path(folder, profile.name, identity.key)
        if not path.exists():
            with LogFolder(folder, profile.name) as held, held.open(identity, {"cpu": "c", "threads": 1, "tvm": "0"}):
                pass
        header = path.read_bytes().splitlines(keepends=True)[0]
        record = {"kind": "winner", "space": "metaschedule", "id": "0x1", "status": "ok", "trace": trace}
        path.write_bytes(header + line_of({**record, "seconds": 1e-9, "runs": [1e-9]}))
        return folder

    return forge


def test_traces_that_do_more_than_rearrange_loops_are_refused_with_file_and_line(
    forged: Callable[[Any], Path],
) -> None:
    check_trace(SOUND)
    profile = get_profile("host")
    bad = traces()
    assert len(bad) > 700
    for trace in bad:
        folder = forged(trace)
        path = log_path(folder, profile.name, small_workload().key)
        with pytest.raises(LogError) as error:
            read_log(path)
        text = str(error.value)
        assert text.startswith(f"{path}, line 2: damaged: trace"), trace
        assert len(text) - len(str(path)) < 600
        assert "\n" not in text


def test_what_a_foreign_log_would_compile_is_neither_built_nor_merged(
    forged: Callable[[Any], Path], tmp_path: Path
) -> None:
    trace = [[*SOUND[0][:3], ["Annotate", ["l2", f'"{IR}"'], ["pragma_import_llvm"], []]], []]
    folder, device = forged(trace), get_profile("host").name
    with pytest.raises(LogError, match=r"line 2.*pragma_import_llvm"):
        build([small_workload()], "host", logs=[folder], out=tmp_path / "b.gfb")
    with pytest.raises(LogError, match=r"line 2.*pragma_import_llvm"):
        merge([folder], tmp_path / "merged", device)
    assert not (tmp_path / "b.gfb").exists()
    assert not (tmp_path / "merged").exists()


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=30))
def test_anything_else_than_a_trace_is_one_error(value: Any) -> None:
    if value != [[], []]:
        with pytest.raises(ValueError, match=r"^trace"):
            check_trace(value)


def test_what_metaschedules_rules_make_is_allowed() -> None:
    for kernel in ("filter_input", "weight_grad", "backward"):
        task = WorkloadTask(replace(small_workload(), kernel=kernel), "host")
        for candidate in MetaScheduleSearch(task, batch=4).propose(4):
            check_trace(candidate.trace)
            record = Record("trial", "metaschedule", candidate.id, "build", None, candidate.trace)
            again = Record.from_dict(json.loads(json.dumps(record.to_dict())))
            assert Candidate.of_record(again) == candidate


def test_every_shipped_log_can_be_read() -> None:
    root = shipped_logs()
    assert root is not None
    paths = sorted(root.glob("*/*.jsonl"))
    assert len(paths) > 100
    for path in paths:
        assert read_log(path).records
