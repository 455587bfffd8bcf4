"""The API reference has every public name, and each says what it is. ``make docs`` builds the site and checks links."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
from checkout import ROOT

import gf_cuda
import gf_tvm
from gf_tvm import errors

DOCS = ROOT / "docs"
DIRECTIVE = re.compile(r"^\.\. auto(?:function|class|exception|module):: ([\w.]+)", re.MULTILINE)


def documented() -> set[str]:
    """The paths that the reference documents."""
    paths = {path for page in DOCS.glob("api/*.rst") for path in DIRECTIVE.findall(page.read_text())}
    if "gf_tvm.errors" in paths:  # with all that it has
        paths |= {f"gf_tvm.errors.{name}" for name, value in vars(errors).items() if inspect.isclass(value)}
    return paths


def names_of(package: ModuleType) -> Iterator[str]:
    """The public names of a package that has them in a table or in a list."""
    homes: dict[str, str] = getattr(package, "_HOMES", {})
    yield from getattr(package, "__all__", homes)


def public() -> dict[str, Any]:
    """What users import, by path."""
    packages = [
        gf_tvm,
        gf_cuda,
        *(import_module(f"gf_tvm.{name}") for name in ("evaluation", "on_demand", "training", "tuning")),
    ]
    found = {f"{package.__name__}.{name}": getattr(package, name) for package in packages for name in names_of(package)}
    found |= {f"gf_tvm.errors.{name}": value for name, value in vars(errors).items() if inspect.isclass(value)}
    found["gf_tvm.functional.conv2d"] = gf_tvm.functional.conv2d
    return found


PUBLIC = public()


def find(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name) if module else import_module(name)


def test_there_are_public_names() -> None:
    assert len(PUBLIC) > 60
    assert {"gf_tvm.load", "gf_tvm.training.TrainConfig", "gf_tvm.tuning.Summary", "gf_cuda.Program"} <= set(PUBLIC)


def test_every_public_name_is_in_the_reference() -> None:
    known = [find(path) for path in documented()]
    # One place is enough for what has two paths, as gf_tvm.tune and gf_tvm.tuning.tune.
    missing = [
        path
        for path, value in PUBLIC.items()
        if not isinstance(value, ModuleType) and not any(value is other for other in known)
    ]
    assert missing == []


def test_the_reference_has_no_path_that_is_not_public() -> None:
    extra = {path for path in documented() if path not in PUBLIC and not isinstance(find(path), ModuleType)}
    assert {path for path in extra if not path.startswith("gf_cuda.nn.")} == set()  # imported by its own name


def own_docstring(value: Any) -> str:
    """Empty for the one that a dataclass without any gets, which is its signature."""
    doc = (vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__) or ""
    return "" if inspect.isclass(value) and doc.startswith(f"{value.__name__}(") else doc


@pytest.mark.parametrize("path", sorted(PUBLIC))
def test_public_name_has_a_docstring(path: str) -> None:
    value = PUBLIC[path]
    assert own_docstring(value).strip(), path
    if inspect.isclass(value):
        # What torch.nn.Module asks for is described there.
        members = [
            name
            for name, member in vars(value).items()
            if not name.startswith("_")
            and name != "extra_repr"
            and (isinstance(member, (property, classmethod, staticmethod)) or inspect.isfunction(member))
            and not (member.__doc__ or "").strip()
        ]
        assert members == [], path
