"""Which MetaSchedule traces a log may have.

A trace is a program for TVM's scheduler, and not every instruction only rearranges loops: an annotation puts LLVM IR or
assembly into the kernel (``pragma_import_llvm``), a split can leave out the check of its bounds, a layout is loaded as
any TVM object. Logs come from other machines, so a trace has only what MetaSchedule's rules for CPUs make of our
kernels: the instructions, attributes, annotations and values below. Needs no TVM.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

#: Of one trace; MetaSchedule's have some 50 to 200.
MAX_INSTRUCTIONS = 4096
# Operands or attributes of one instruction, and entries of one list in it.
_MAX_LENGTH = 64
_MAX_INTEGER = (1 << 31) - 1
#: Of the iterations that a loop is unrolled to: MetaSchedule's largest for GPUs; for CPUs it is 512.
_MAX_UNROLL = 1024

_VARIABLE = re.compile(r"[blv][0-9]{1,9}", re.ASCII)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,199}", re.ASCII)
_TILING = re.compile(r'"[SR]{1,16}"', re.ASCII)

_Check = Callable[[Any], bool]


def _integer(low: int, high: int) -> _Check:
    return lambda value: isinstance(value, int) and low <= value <= high


def _variable(value: Any) -> bool:
    return isinstance(value, str) and _VARIABLE.fullmatch(value) is not None


def _list_of(check: _Check) -> _Check:
    return lambda value: isinstance(value, list) and len(value) <= _MAX_LENGTH and all(check(item) for item in value)


def _matches(pattern: re.Pattern[str]) -> _Check:
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


def _is_fraction(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 1


_FLAG, _COUNT = _integer(0, 1), _integer(1, _MAX_LENGTH)
_PLACE = _integer(-_MAX_LENGTH, _MAX_LENGTH)
_SIZE = _integer(1, _MAX_INTEGER)

#: What may be annotated, and with which values. TVM acts on no others here, but on many others elsewhere.
_ANNOTATIONS: dict[str, _Check] = {
    "meta_schedule.parallel": _integer(0, _MAX_INTEGER),
    "meta_schedule.random_compute_producer": _FLAG,
    "meta_schedule.tiling_structure": _matches(_TILING),
    "meta_schedule.unroll_explicit": lambda value: _variable(value) or _integer(0, _MAX_UNROLL)(value),
    "meta_schedule.vectorize": _integer(0, _MAX_INTEGER),
    "pragma_auto_unroll_max_step": _integer(0, _MAX_UNROLL),
    "pragma_unroll_explicit": _FLAG,
}


def _is_split(value: Any) -> bool:
    # TVM's word for the part that is left over.
    return value == "None" or _variable(value) or _SIZE(value)


def _is_annotation(key: Any) -> bool:
    return isinstance(key, str) and key in _ANNOTATIONS


#: Of each instruction: a check of every operand (the last one for all that follow) and one of every attribute.
_INSTRUCTIONS: dict[str, tuple[tuple[_Check, ...], tuple[_Check, ...]]] = {
    "Annotate": ((_variable, lambda value: True), (_is_annotation,)),  # the value: see _check_instruction
    "CacheWrite": ((_variable, _list_of(_variable)), (_integer(0, _MAX_LENGTH), lambda scope: scope == "global")),
    "ComputeAt": ((_variable,), (_FLAG, _PLACE)),
    "ComputeInline": ((_variable,), ()),
    "DecomposeReduction": ((_variable,), ()),
    "EnterPostproc": ((), ()),
    "Fuse": ((_variable,), (_FLAG,)),
    "GetChildBlocks": ((_variable,), ()),
    "GetConsumers": ((_variable,), ()),
    "GetLoops": ((_variable,), ()),
    "GetProducers": ((_variable,), ()),
    "GetSBlock": ((), (_matches(_NAME), lambda function: function == "main")),
    "Parallel": ((_variable,), ()),
    "RFactor": ((_variable,), (_PLACE,)),
    "Reorder": ((_variable,), ()),
    "ReverseComputeAt": ((_variable,), (_FLAG, _PLACE)),
    "ReverseComputeInline": ((_variable,), ()),
    "SampleCategorical": ((), (_list_of(_integer(0, _MAX_UNROLL)), _list_of(_is_fraction))),
    "SampleComputeLocation": ((_variable,), ()),
    "SamplePerfectTile": ((_variable,), (_COUNT, _SIZE)),
    # The second flag leaves out the check of the loop's bounds.
    "Split": ((_variable, _is_split), (_FLAG, lambda value: value is False or value == 0)),
    "Unannotate": ((_variable,), (_is_annotation,)),
    "Vectorize": ((_variable,), ()),
}


def check_trace(trace: Any) -> None:
    """Raise ValueError, naming the instruction, unless a trace only rearranges loops as MetaSchedule's rules do.

    Args:
        trace: as plain JSON values: the instructions (name, operands, attributes, results) and the decisions (number of
            an instruction, value).
    """
    if not (isinstance(trace, list) and len(trace) == 2 and all(isinstance(part, list) for part in trace)):
        raise ValueError("trace must be a list of instructions and one of decisions")
    instructions, decisions = trace
    if max(len(instructions), len(decisions)) > MAX_INSTRUCTIONS:
        raise ValueError(f"trace has more than {MAX_INSTRUCTIONS} instructions or decisions")
    for number, instruction in enumerate(instructions):
        try:
            _check_instruction(instruction)
        except ValueError as error:
            raise ValueError(f"trace, instruction {number}: {error}") from None
    for decision in decisions:
        if not (isinstance(decision, list) and len(decision) == 2 and _integer(0, len(instructions) - 1)(decision[0])):
            raise ValueError("trace: a decision must be an instruction's number and a value")
        number, value = decision
        whole = _integer(-_MAX_INTEGER, _MAX_INTEGER)
        if not instructions[number][0].startswith("Sample") or not (whole(value) or _list_of(whole)(value)):
            raise ValueError(f"trace: the decision of instruction {number} must be integers, of one that samples")


def _check_instruction(instruction: Any) -> None:
    if not (
        isinstance(instruction, list)
        and len(instruction) == 4
        and isinstance(instruction[0], str)
        and all(isinstance(part, list) and len(part) <= _MAX_LENGTH for part in instruction[1:])
    ):
        raise ValueError("must be a name, operands, attributes and results")
    name, operands, attributes, results = instruction
    if name not in _INSTRUCTIONS:
        raise ValueError(f"{_shown(name)} is not allowed in a log; allowed: {', '.join(sorted(_INSTRUCTIONS))}")
    of_operands, of_attributes = _INSTRUCTIONS[name]
    if len(attributes) != len(of_attributes):
        raise ValueError(f"{name} must have {len(of_attributes)} attributes")
    for check, value in zip(of_attributes, attributes, strict=True):
        if not check(value):
            raise ValueError(f"{name} with the attribute {_shown(value)} is not allowed in a log")
    if operands and not of_operands:
        raise ValueError(f"{name} must have no operands")
    for place, value in enumerate(operands):
        if not of_operands[min(place, len(of_operands) - 1)](value):
            raise ValueError(f"{name} with the operand {_shown(value)} is not allowed in a log")
    if name == "Annotate" and not (len(operands) == 2 and _ANNOTATIONS[attributes[0]](operands[1])):
        raise ValueError(f"the value of {attributes[0]} is not one that MetaSchedule gives it")
    if not _list_of(_variable)(results):
        raise ValueError(f"{name}: results must be variables")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
