"""A chain's backward pass in TVM's IR: one function, which calls those of its stages one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from ...core.workload import Workload
from ...kernels.cpu import simd
from ...kernels.stages import ACC
from ...machine.profiles import DeviceProfile
from ..plan.steps import Expand, Gather, MapSum, PatchSum, Step, Take
from .compiled import Backward, Numbers
from .emit_stage import StageEmitter
from .stage import Operand, Stage


def emit_backward(program: Backward, profile: DeviceProfile, config_of: Callable[[Workload], dict[str, Any]]) -> Any:
    """The IRModule of ``program``: ``main``, which calls a function for each stage.

    Stages that do the same to other tensors share a function: it is compiled once, and when it is called again its code
    is in the caches, which the forward pass has filled with other things.
    """
    functions: dict[Any, tuple[tvm.ir.GlobalVar, Any]] = {}
    calls: list[tuple[tvm.ir.GlobalVar, list[Operand]]] = []
    written: set[tuple[str, int]] = set(program.zeroed)
    taken: dict[int, Operand] = {}  # registers that are gradients which came in
    for steps in program.stages:
        first = steps[0]
        if isinstance(first, Take):
            taken[first.dst] = ("grad", first.value)
            continue
        adds = []
        for step in steps:
            target = _target(step)
            adds.append(target in written)
            if target is not None:
                written.add(target)
        stage, operands = _stage_of(program, steps, tuple(adds))
        if stage not in functions:
            name = f"{program.key}_{len(functions)}"
            emitter = StageEmitter(stage, program.tables, profile, config_of)
            functions[stage] = tvm.ir.GlobalVar(name), emitter.function(name)
        variable, _ = functions[stage]
        calls.append((variable, [taken.get(k, (kind, k)) if kind == "register" else (kind, k) for kind, k in operands]))
    return tvm.IRModule({"main": _main(program, calls), **dict(functions.values())})


def _target(step: Step) -> Operand | None:
    """The gradient of a parameter or an entry that a step may add to."""
    if isinstance(step, PatchSum):
        return "tensor", step.tensor
    return ("entry", step.value) if isinstance(step, Expand) else None


def _stage_of(program: Backward, steps: Sequence[Step], adds: tuple[bool, ...]) -> tuple[Stage, list[Operand]]:
    """A stage, and the program's tensors that its function takes there."""
    numbers = Numbers("value", "slot", "tensor", "register")
    own = tuple(map(numbers.of, steps))
    old = {kind: tuple(known) for kind, known in numbers.known.items()}
    places, _ = program.places
    incoming = {step.dst for step in program.steps if isinstance(step, Take)}
    shapes = {argument.number: argument.shape for argument in program.arguments if argument.kind == "tensor"}
    uses_tables = any(isinstance(step, PatchSum | MapSum | Gather) for step in steps)
    stage = Stage(
        batch=program.batch,
        steps=own,
        adds=adds,
        registers=tuple(program.registers[k] for k in old["register"]),
        values=tuple(program.values[k] for k in old["value"]),
        slots=tuple(program.slots[k] for k in old["slot"]),
        tensors=tuple(shapes[k] for k in old["tensor"]),
        stored=frozenset(new for new, k in enumerate(old["register"]) if k in places or k in incoming),
        floats=len(program.tables.floats) if uses_tables else 0,
        integers=len(program.tables.integers) if uses_tables else 0,
    )
    kinds = {"grad": "value", "entry": "value"}
    return stage, [
        (kind, old[kinds.get(kind, kind)][k] if kinds.get(kind, kind) in old else 0) for kind, k in stage.sizes
    ]


def _main(program: Backward, calls: Sequence[tuple[tvm.ir.GlobalVar, list[Operand]]]) -> Any:
    """The function that takes the program's arguments and calls those of its stages."""
    with IRBuilder() as builder, T.prim_func():
        T.func_name("main")
        T.func_attr({"tirx.noalias": True})
        # All parameters first: TVM takes none after anything else.
        parameters = [
            T.arg(
                f"{a.kind}{a.number}" if a.kind not in ("workspace", "floats", "integers") else a.kind,
                T.buffer(a.shape, "int32" if a.kind == "integers" else ACC),
            )
            for a in program.arguments
        ]
        keys = [(argument.kind, argument.number) for argument in program.arguments]
        given = {key: simd.flat(tensor) for key, tensor in zip(keys, parameters, strict=True)}
        places, _ = program.places

        def address(operand: Operand) -> Any:
            kind, number = operand
            at = 0
            if kind == "slot" and number in program.layout.places:
                pack, at, _ = program.layout.places[number]
                operand = "pack", pack
            if kind in ("register", "workspace"):
                at = places[number] if kind == "register" else program.scratch
                operand = "workspace", 0
            return tirx.address_of(tirx.BufferLoad(given[operand], [at]))

        with simd.streaming(ACC, shared=True):
            for variable, operands in calls:
                T.evaluate(variable(*map(address, operands)))
                # TVM tells LLVM that pointers of different names never meet, which holds within a stage only. What LLVM
                # inlines here must not read a register before the stage that writes it, by another name, has done so.
                simd.fence()
    return builder.get()
