"""A compiled forward pass in TVM's IR: one function, which calls those of its steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from ..blocked.emit_steps import step_function
from ..blocked.steps import Step
from ..chains.compile.emit_functions import function
from ..kernels.cpu import emit, simd
from ..kernels.stages import ACC
from ..machine.profiles import DeviceProfile
from .front import Call, Front


def emit_front(front: Front, profile: DeviceProfile) -> Any:
    """The IRModule of ``front``: ``main`` takes entries, packed parameters, arena and exits.

    Steps that do the same to other maps share a function.
    """
    functions: dict[Step, tuple[tvm.ir.GlobalVar, Any]] = {}
    for call in front.calls:
        if call.step not in functions:
            name = f"{front.key}_{len(functions)}"
            functions[call.step] = tvm.ir.GlobalVar(name), step_function(call.step, name, profile.lanes, function)
    variables = {step: variable for step, (variable, _) in functions.items()}
    return tvm.IRModule({"main": _main(front, variables), **dict(functions.values())})


def _main(front: Front, functions: dict[Step, tvm.ir.GlobalVar]) -> Any:
    with IRBuilder() as builder, T.prim_func():
        T.func_name("main")
        T.func_attr({"tirx.noalias": True})
        layouts = front.layouts
        memory = front.memory
        given: list[tuple[Any, int]] = [(value, front.batch * layouts[value].image) for value in front.entries]
        given += [("weights", front.weights), ("arena", memory.size)]
        given += [(value, front.batch * layouts[value].image) for value in front.exits]
        parameters = [T.arg(f"t{k}", T.buffer((max(size, 1),), ACC)) for k, (_, size) in enumerate(given)]
        tensors = {key: simd.flat(tensor) for (key, _), tensor in zip(given, parameters, strict=True)}

        def address(value: int, first: Any, part: Any) -> Any:
            """Where the images of a value begin, from image ``first`` of the batch on, for one of the parts."""
            where = "arena"
            if value in memory.own:
                at = memory.shared_size + part * memory.own_size + memory.own[value]
            elif value in memory.shared:
                at = memory.shared[value] + (first * layouts[value].image if value in front.whole else 0)
            else:
                where, at = value, first * layouts[value].image
            return tirx.address_of(tirx.BufferLoad(tensors[where], [at]))

        def calls(of: Sequence[Call], first: Any, part: Any = 0) -> None:
            for call in of:
                operands = [address(value, first, part) for value in call.inputs]
                if call.step.weights:
                    operands.append(tirx.address_of(tirx.BufferLoad(tensors["weights"], [call.weights])))
                operands.append(address(call.result, first, part))
                T.evaluate(functions[call.step](*operands))
                # See chains.compile.emit_backward: pointers of different names never meet within a step only.
                simd.fence()

        with simd.streaming(ACC, shared=True):
            parts = T.bind(tirx.min(emit.threads(), front.parts))
            for nest in front.nests:
                turns = front.batch // nest.images
                if nest.by_images:
                    with T.parallel(0, parts) as part, T.serial(0, (turns - part + parts - 1) // parts) as k:
                        calls(nest.calls, (part + k * parts) * nest.images, part)
                else:
                    with emit.loop(turns) as k:
                        calls(nest.calls, k * nest.images if turns > 1 else 0)
    return builder.get()
