"""A graph that Dynamo captured, as one list of ATen operators before dispatch.

Before dispatch, convolutions and batch norms are still one operator each, and autocast has not cast anything yet: the
graph means the same under whatever autocast it runs. Switches of autocast and gradients stay in the list, and so do
calls that run a graph of their own (checkpointing).
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils import _pytree as pytree

#: In ``meta`` of an operator that :func:`without_changes` put in place of one that works in place: that one.
IN_PLACE = "gf_tvm_in_place"
#: In ``meta`` of what a graph takes: Dynamo's name of it; and of a parameter or buffer its fully qualified name.
SOURCE, PATH = "gf_tvm_source", "gf_tvm_path"
#: In ``meta`` of a step: fully qualified name and class of the module whose code computes it.
MODULE = "gf_tvm_module"


class NotTaken(Exception):
    """Why a graph cannot be put into ATen operators."""


class _Runner(fx.Interpreter):
    """Runs a captured graph on tensors without values, and records calls of graphs as they are."""

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_function" and isinstance(n.target, HigherOrderOperator):
            return self._record(n)
        return super().run_node(n)

    def _record(self, node: fx.Node) -> Any:
        from torch.fx.experimental import proxy_tensor

        args, kwargs = self.fetch_args_kwargs_from_env(node)
        mode = proxy_tensor.get_proxy_mode()
        assert mode is not None
        tracer: Any = mode.tracer

        def recorded(value: Any) -> Any:
            if isinstance(value, Tensor):
                return proxy_tensor.get_proxy_slot(value, tracer).proxy
            if isinstance(value, fx.GraphModule):
                name = f"graph_{sum(isinstance(m, fx.GraphModule) for m in tracer.root.children())}"
                setattr(tracer.root, name, value)
                return tracer.create_proxy("get_attr", name, (), {})
            return value

        args, kwargs = pytree.tree_map(recorded, (args, kwargs))
        proxy = tracer.create_proxy("call_function", node.target, args, kwargs)
        result = pytree.tree_map_only(Tensor, Tensor.detach, node.meta["example_value"])
        return proxy_tensor.track_tensor_tree(result, proxy, constant=None, tracer=tracer)


def to_aten(captured: fx.GraphModule, given: Sequence[Any] | None = None, prefix: str = "") -> fx.GraphModule:
    """The same graph in ATen operators, and the graphs of checkpointed parts.

    Every step has its result without values as ``meta["val"]``.

    Args:
        given: tensors without values and numbers to take it for; None: those that Dynamo captured it for.
        prefix: what stands before names of parameters: Dynamo names them as the captured code reaches them.

    Raises:
        NotTaken: PyTorch's tracer does not take it.
    """
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.fx import traceback
    from torch.fx.experimental.proxy_tensor import make_fx

    # Detached: of what records a gradient, hooks on saved tensors would be told, and checkpointing sets such.
    if given is None:
        given = [node.meta["example_value"] for node in placeholders(captured.graph)]
    given = [_detached(value) for value in given]
    # Their own mode, so that what an operator makes on the way has no values either.
    fake = next((t.fake_mode for t in given if isinstance(t, FakeTensor)), nullcontext())
    with traceback.preserve_node_meta(), fake:
        try:
            found: fx.GraphModule = make_fx(lambda *args: _Runner(captured).run(*args), pre_dispatch=True)(*given)
        except Exception as error:  # PyTorch's tracers run the user's model on tensors without values
            raise NotTaken(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}") from error
    for ours, theirs in zip(placeholders(found.graph), placeholders(captured.graph), strict=True):
        ours.meta[SOURCE] = theirs.name
        path = path_of(theirs)
        if path is not None:
            ours.meta[PATH] = prefix + path
    for node in found.graph.nodes:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        if stack:
            path, kind = stack[-1]
            node.meta[MODULE] = ".".join(_parts(str(path))), kind
    _pad_explicitly(found.graph)
    for node in checkpoints(found.graph):
        name = graph_of(node)
        setattr(found, name, to_aten(getattr(found, name), prefix=prefix))
    return found


def _pad_explicitly(graph: fx.Graph) -> None:
    """Write "same" that is uneven as a padding of its own, so that convolutions have numbers."""
    aten: Any = torch.ops.aten
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not aten.conv2d.padding:
            continue
        given = arguments_of(node)
        kernel, dilation = value_of(given["weight"]).shape[2:], given["dilation"]
        total = [d * (k - 1) for d, k in zip((dilation[0], dilation[-1]), kernel, strict=True)]
        odd = [t % 2 for t in total]
        if given["padding"] != "same" or not any(odd):
            continue
        pad = [0, odd[1], 0, odd[0]]
        with graph.inserting_before(node):
            padded = graph.call_function(aten.constant_pad_nd.default, (given["input"], pad))
        padded.meta = {**node.meta, "val": torch.nn.functional.pad(value_of(given["input"]), pad)}
        node.target, node.kwargs = aten.conv2d.default, {}
        rest = (given["stride"], [t // 2 for t in total], dilation, given["groups"])
        node.args = (padded, given["weight"], given["bias"], *rest)


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """What an operator is called with, by name, defaults filled in."""
    assert isinstance(node.target, OpOverload)
    found: dict[str, Any] = {}
    for number, argument in enumerate(node.target._schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        found[argument.name] = node.args[number] if number < len(node.args) else node.kwargs.get(argument.name, default)
    return found


def checkpoints(graph: fx.Graph) -> list[fx.Node]:
    """The steps that run a graph again in the backward pass; their first argument is that graph."""
    kind = torch.ops.higher_order.tag_activation_checkpoint
    return [node for node in graph.nodes if node.op == "call_function" and node.target is kind]


#: Dynamo names a module by how the compiled function reaches it: "L['module'].layer4.0", with brackets or getattr where
#: the code has them: "getattr(L['module'].layer4, '0').conv1".
_PART = re.compile(r"""\.([^.,()\[\]]+)|\[(\d+)\]|(?:\[|, )('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""")


def _parts(path: str) -> list[str]:
    """Names of modules and tensors on the way from what was compiled."""
    found = [attribute or index or ast.literal_eval(text) for attribute, index, text in _PART.findall(path)]
    return [part for part in found[1:] if part not in ("_modules", "_parameters", "_buffers")]


def path_of(placeholder: fx.Node) -> str | None:
    """Name of a parameter or buffer that Dynamo captured, relative to the module whose frame it captured."""
    source = getattr(placeholder.meta.get("grapharg"), "source", None)
    if source is None:
        return None
    name = source.name if isinstance(source.name, str) else source.name()
    return ".".join(_parts(name)) if "._parameters[" in name or "._buffers[" in name else None


def graph_of(checkpoint: fx.Node) -> str:
    """Where in the module the graph of a checkpointed part is."""
    body = checkpoint.args[0]
    assert isinstance(body, fx.Node)
    return str(body.target)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """What a graph takes, in order."""
    return [node for node in graph.nodes if node.op == "placeholder"]


def has_symbols(captured: fx.GraphModule) -> bool:
    """Whether Dynamo captured a graph for sizes that may change."""
    for node in placeholders(captured.graph):
        value = node.meta["example_value"]
        sizes = value.shape if isinstance(value, Tensor) else [value]
        if any(isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool) for size in sizes):
            return True
    return False


def without_values(inputs: Sequence[Any]) -> list[Any]:
    """Inputs of a graph as :func:`to_aten` takes them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()
    return [mode.from_tensor(t, static_shapes=True) if isinstance(t, Tensor) else t for t in inputs]


def value_of(node: fx.Node) -> Any:
    """A step's result without values: a tensor, several, or something else."""
    return node.meta.get("val")


def switches(node: fx.Node) -> bool:
    """Whether a step changes how the steps after it run: autocast, gradients."""
    if node.op != "call_function" or isinstance(node.target, OpOverload | HigherOrderOperator):
        return False
    return getattr(node.target, "__module__", "") != "_operator"


def changes(node: fx.Node) -> list[fx.Node]:
    """The arguments that a step writes to."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return []
    found: list[fx.Node] = []
    for number, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = node.kwargs.get(argument.name, node.args[number] if number < len(node.args) else None)
        fx.node.map_arg(value, found.append)
    return found


def is_view(node: fx.Node) -> bool:
    """Whether a step's result may be memory of one of its arguments."""
    if node.op != "call_function":
        return node.op != "placeholder"
    if node.target is operator.getitem:
        return isinstance(node.args[0], fx.Node) and is_view(node.args[0])
    if not isinstance(node.target, OpOverload):
        return True
    if node.target in (torch.ops.aten.dropout.default, torch.ops.aten.feature_dropout.default):
        return True  # in evaluation
    schema = node.target._schema
    written = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    if written:
        return False
    return any(r.alias_info is not None for r in schema.returns) or node.target in _PERHAPS_VIEWS


#: Operators whose result is sometimes their argument, which their schemas do not say.
_PERHAPS_VIEWS = {
    torch.ops.aten.contiguous.default,
    torch.ops.aten.to.dtype,
    torch.ops.aten.to.device,
    torch.ops.aten.to.other,
    torch.ops.aten.to.dtype_layout,
    torch.ops.aten.reshape.default,
    torch.ops.aten.flatten.using_ints,
    torch.ops.aten.dropout_.default,
}


def without_changes(graph: fx.Graph) -> None:
    """Write what works in place on memory of its own as what it computes, so that steps may run in another order.

    What is changed while another name of it may be read stays as it is: it is a border, see :func:`is_border`.
    """
    position = {node: k for k, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        written = changes(node)
        if len(written) != 1 or node.args[:1] != (written[0],):
            continue
        pure, source = _pure(node), written[0]
        if pure is None or is_view(source) or source.op == "placeholder" or _val_differs(node, source):
            continue
        if any(is_view(user) and user is not node for user in source.users):
            continue
        later = [user for user in source.users if position[user] > position[node]]
        # A name of the old contents is the new contents from here on.
        for user in later:
            user.replace_input_with(source, node)
        node.meta[IN_PLACE] = node.target if set(source.users) == {node} else None
        node.target = pure
    graph.lint()


def _val_differs(node: fx.Node, source: fx.Node) -> bool:
    """Whether what is written in place would have another dtype or shape if it were not."""
    try:
        result, into = value_of(node), value_of(source)
        return bool(result.shape != into.shape or result.dtype != into.dtype or not _same_out_of_place(node, into))
    except (AttributeError, RuntimeError):
        return True


def _same_out_of_place(node: fx.Node, into: Tensor) -> bool:
    """``x.add_(y)`` keeps x's dtype where ``x + y`` has a wider one."""
    tensors = [value_of(a) for a in node.all_input_nodes]
    return all(isinstance(t, Tensor) and (t.dtype == into.dtype or t.dim() == 0) for t in tensors)


def _pure(node: fx.Node) -> OpOverload | None:
    """The operator that computes what one in place does."""
    assert isinstance(node.target, OpOverload)
    space, _, name = node.target._schema.name.partition("::")
    if not name.endswith("_") or len(node.target._schema.returns) != 1:
        return None
    packet = getattr(getattr(torch.ops, space), name.removesuffix("_"), None)
    return getattr(packet, node.target._overloadname, None)


def is_border(node: fx.Node, sole_reader: Callable[[fx.Node], bool]) -> bool:
    """Whether nothing may be moved from before this step to after it, or back.

    ``sole_reader``: whether nobody but the one step reads an argument that it writes to (a counter, say).
    """
    if switches(node) or isinstance(node.target, HigherOrderOperator):
        return True
    return any(source.op != "placeholder" or not sole_reader(source) for source in changes(node))


def stretches(graph: fx.Graph) -> Sequence[list[fx.Node] | fx.Node]:
    """The steps in order: borders one by one, and what lies between them, in lists."""
    found: list[list[fx.Node] | fx.Node] = []
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        if is_border(node, lambda source: len(source.users) == 1):
            found.append(node)
        elif found and isinstance(found[-1], list):
            found[-1].append(node)
        else:
            found.append([node])
    return found
