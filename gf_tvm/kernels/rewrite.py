"""Two small rewrites that turn what TE can say into what the dilated kernels need, before anything is scheduled.

TE computes every element of a tensor from its index, one loop nest a tensor. Two things cannot be said that way:

* an expanded gradient is written patch by patch, and the patches at the edge stick out of the map
  (:func:`store_into`);
* a chain of nests over the same blocks should be one loop over the blocks, although a later nest reads the first
  one's result again (:func:`share_outer_loop`; ``compute_at`` refuses that, because not every reader is inside).

Both work on the fresh output of ``te.create_prim_func``: a root block with one nest of plain loops a stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm
from tvm import s_tir, tirx


def _with_root_body(func: Any, body: Any) -> Any:
    root = func.body.block
    block = s_tir.SBlock(root.iter_vars, root.reads, root.writes, root.name_hint, body, None, root.alloc_buffers)
    return func.with_body(s_tir.SBlockRealize(func.body.iter_values, func.body.predicate, block))


def _nests(func: Any) -> list[Any]:
    body = func.body.block.body
    return list(body.seq) if isinstance(body, tirx.SeqStmt) else [body]


def _sequence(nests: Sequence[Any]) -> Any:
    return tirx.SeqStmt(list(nests)) if len(nests) > 1 else nests[0]


def _stage_name(nest: Any) -> str:
    while not isinstance(nest, s_tir.SBlockRealize):
        nest = nest.body
    return str(nest.block.name_hint)


def _rebuild(nest: Any, block: Callable[[Any], Any]) -> Any:
    """Copy a nest of loops, its one block realisation replaced by ``block(realisation)``."""
    if isinstance(nest, tirx.For):
        body = _rebuild(nest.body, block)
        return tirx.For(nest.loop_var, nest.min, nest.extent, nest.kind, body, nest.thread_binding, nest.annotations)
    return block(nest)


def store_into(
    func: Any,
    stage: str,
    shape: Sequence[int],
    index: Callable[..., Sequence[Any]],
    inside: Callable[..., Any] | None = None,
) -> Any:
    """Let ``stage``, an output of ``func``, write to a parameter of another shape.

    Args:
        func: the PrimFunc; ``stage`` names both the block and the parameter.
        shape: the parameter's new shape.
        index: maps the stage's axes to an index of the new parameter; injective.
        inside: of the axes; where it is false nothing is written.
    """
    old = next(param for param in func.params if param.name == stage)
    new = tirx.decl_buffer(shape, old.ty.dtype, stage)

    def block(realize: Any) -> Any:
        inner = realize.block
        axes = [axis.var for axis in inner.iter_vars]
        where = index(*axes)
        store = tirx.BufferStore(new, inner.body.value, where)
        if inside is not None:
            store = tirx.IfThenElse(inside(*axes), store, None)
        region = tvm.ir.TensorRegion(new, [tvm.ir.Range.from_min_extent(i, 1) for i in where], inner.writes[0].ty)
        made = s_tir.SBlock(inner.iter_vars, inner.reads, [region], inner.name_hint, store)
        return s_tir.SBlockRealize(realize.iter_values, realize.predicate, made)

    nests = [_rebuild(nest, block) if _stage_name(nest) == stage else nest for nest in _nests(func)]
    params = [new if param.same_as(old) else param for param in func.params]
    func = _with_root_body(func, _sequence(nests))
    return tirx.PrimFunc(params, func.body, func.ret_type, func.attrs)


def share_outer_loop(func: Any, stages: Sequence[str], before: Sequence[str] = ()) -> Any:
    """Put the nests of ``stages`` into one loop over their first axis, after those of ``before``, ahead of the rest.

    The caller answers for it that each stage reads of the others only what has the same index on that axis.
    """
    nests = {_stage_name(nest): nest for nest in _nests(func)}
    outer = nests[stages[0]]
    inner = []
    for stage in sorted(stages, key=list(nests).index):
        nest = nests[stage]

        def block(realize: Any, old: Any = nest.loop_var) -> Any:
            values = [outer.loop_var if value.same_as(old) else value for value in realize.iter_values]
            return s_tir.SBlockRealize(values, realize.predicate, realize.block)

        inner.append(_rebuild(nest.body, block))
    loop = tirx.For(outer.loop_var, outer.min, outer.extent, outer.kind, _sequence(inner))
    first = [nests[name] for name in before if name in nests]
    rest = [nest for name, nest in nests.items() if name not in (*stages, *before)]
    return _with_root_body(func, _sequence([*first, loop, *rest]))
