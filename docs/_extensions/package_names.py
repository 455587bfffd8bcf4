"""What autodoc needs to know of the packages' names, wherever the modules that define them lie.

* ``package-type`` documents a class that public functions take or return and that no public name stands for, by its
  name alone. Where several modules define a class of that name, ``:near:`` names a public function whose module uses
  the right one. ``:opaque:`` leaves out how it is made and what it has.
* A name in a docstring means what it means in the module where the docstring was written.
* A reference leads to the public name, if there is one. What has no place in the reference, such as PyTorch's types and
  what only contributors need, becomes plain code, if it exists: a reference to nothing is an error. So is a signature,
  or "Raises:", with a class of the packages that is not documented.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import sys
from types import ModuleType
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.addnodes import desc_addname, pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

PACKAGES = ("gf_tvm", "gf_cuda")
#: ``:func:`name``` and ``:func:`~name```, and what napoleon makes of "Raises:".
ROLE = re.compile(r":(func|class|meth|attr|data|exc|mod):`(~?)\.?([\w.]+)`")
RAISES = re.compile(r"^:raises ([\w.]+):")


def import_modules() -> list[ModuleType]:
    """Every module of the packages."""
    names = list(PACKAGES)
    for package in PACKAGES:
        folders = importlib.import_module(package).__path__
        names += [module.name for module in pkgutil.walk_packages(folders, f"{package}.")]
    return [importlib.import_module(name) for name in names if not name.endswith(".__main__")]


def import_types(module: ModuleType) -> None:
    """Run what a module imports for type checkers only: its signatures cannot be resolved without."""
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            exec(compile(ast.Module(node.body, []), str(module.__file__), "exec"), vars(module))


def find(path: str) -> Any:
    """What an absolute path, or the name of a built-in, stands for; None if nothing."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        try:
            for part in parts[count:]:
                # A dataclass has no attribute for a field without a default.
                fields = getattr(value, "__dataclass_fields__", {})
                value = fields[part] if part in fields else getattr(value, part)
        except AttributeError:
            return None
        return value
    return vars(sys.modules["builtins"]).get(path)


def absolute(name: str, module: ModuleType, owner: str) -> str:
    """The absolute path of what ``name`` is in a docstring of ``owner``, a class or function of the module.

    The packages' errors need not be imported to be raised, by what a function calls.
    """
    first, _, rest = name.partition(".")
    package = module.__name__ if hasattr(module, "__path__") else module.__name__.rpartition(".")[0]
    candidates = [f"{module.__name__}.{name}", f"{package}.{name}", f"{module.__name__.split('.')[0]}.errors.{name}"]
    if "." in owner or inspect.isclass(find(f"{module.__name__}.{owner}")):
        candidates.insert(0, f"{module.__name__}.{owner.split('.')[0]}.{name}")
    value = vars(module).get(first)
    if inspect.isclass(value) or inspect.isfunction(value):
        candidates.insert(0, f"{value.__module__}.{value.__qualname__}{'.' * bool(rest)}{rest}")
    return next((path for path in candidates if find(path) is not None), name)


def write_paths(app: Sphinx, what: str, path: str, value: Any, options: Any, lines: list[str]) -> None:
    """Replace the names in a docstring, which napoleon has processed, by absolute paths."""
    value = getattr(value, "fget", value)  # a property
    value = getattr(value, "__func__", value)  # a class method
    module = value if inspect.ismodule(value) else sys.modules.get(getattr(value, "__module__", None) or "")
    if module is None or not module.__name__.startswith(PACKAGES):
        return
    owner = getattr(value, "__qualname__", "")

    def raises(match: re.Match[str]) -> str:
        path = absolute(match[1], module, owner)
        return f":raises {'~' if '.' in path else ''}{path}:"

    def role(match: re.Match[str]) -> str:
        kind, short, name = match.groups()
        shown = name.rpartition(".")[2] if short else name
        return f":{kind}:`{shown} <{absolute(name, module, owner)}>`"

    for index, line in enumerate(lines):
        lines[index] = RAISES.sub(raises, ROLE.sub(role, line))


def write_signature(
    app: Sphinx, what: str, path: str, value: Any, options: Any, signature: str | None, result: str | None
) -> tuple[str | None, str | None]:
    """``<factory>``, a dataclass's default list or dict, is no Python, and a protocol is not called."""
    if getattr(value, "_is_protocol", False):
        signature = ""
    return signature and signature.replace("<factory>", "..."), result


def keep_first_line(app: Sphinx, what: str, path: str, value: Any, options: Any, lines: list[str]) -> None:
    """Before napoleon: it takes what stands before a colon in the first line of a property's docstring for a type."""
    if what in ("attribute", "property"):
        lines[:0] = ["..", ""]  # an empty comment


def split_attributes(app: Sphinx, what: str, path: str, value: Any, options: Any, lines: list[str]) -> None:
    """After napoleon: "a, b: text" in "Attributes:" is about both, as it is in "Args:"."""
    index = 0
    while index < len(lines):
        match = re.match(r":ivar (\w+(?:, \w+)+):", lines[index])
        end = index + 1
        if match:
            while end < len(lines) and (not lines[end] or lines[end].startswith(" ")):
                end += 1
            text = [lines[index][match.end() :], *lines[index + 1 : end]]
            names = match[1].split(", ")
            lines[index:end] = [line for name in names for line in (f":ivar {name}:{text[0]}", *text[1:])]
        index += 1


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Node) -> nodes.Node | None:
    """Lead a reference that found nothing to the public name of what it means, or make it plain code."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    value = find(target)
    if value is None:
        return None
    for path, entry in env.domains.python_domain.objects.items():
        if path.rpartition(".")[2] == target.rpartition(".")[2] and find(path) is value:
            return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, content, path)
    ours = inspect.isclass(value) and value.__module__.split(".")[0] in PACKAGES
    return None if ours and not isinstance(content, nodes.literal) else content


class PackageType(SphinxDirective):
    required_arguments = 1
    option_spec: ClassVar = {"near": directives.unchanged_required, "opaque": directives.flag}

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        if near := self.options.get("near"):
            found = {getattr(sys.modules[find(near).__module__], name)}
        else:
            found = {value for module in import_modules() if inspect.isclass(value := vars(module).get(name))}
        if len(found) != 1:
            raise self.error(f"{len(found)} classes are called {name}: {found}")
        (kind,) = found
        text = f".. autoclass:: {kind.__module__}.{kind.__qualname__}"
        text += "()\n" if "opaque" in self.options else "\n   :members:\n"
        documented = self.parse_text_to_nodes(text)
        for node in documented:
            for path in list(node.findall(desc_addname)):
                path.parent.remove(path)
        return documented


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("package-type", PackageType)
    app.connect("autodoc-process-docstring", keep_first_line, priority=400)  # napoleon: 500
    app.connect("autodoc-process-docstring", split_attributes, priority=600)
    app.connect("autodoc-process-docstring", write_paths, priority=610)
    app.connect("autodoc-process-signature", write_signature)
    app.connect("missing-reference", resolve)
    for module in import_modules():
        import_types(module)
    return {"parallel_read_safe": True}
