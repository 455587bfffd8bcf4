"""Folders are layers: imports run downwards, in no circles. pyproject.toml has the order, architecture.md shows it."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkout import FOLDERS, ROOT
from importlinter import api

PYPROJECT = ROOT / "pyproject.toml"
#: Names in strings that import nothing: the command that boards run, a folder that goes into their wheel, and the
#: public home of a class.
NOT_IMPORTED = {"gf_tvm.runners.cli", "gf_tvm.runners", "gf_tvm.nn"}


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A folder with the packages as they are installed: import-linter knows no folders of other names."""
    for folder, package in FOLDERS.items():
        for file in (ROOT / folder).rglob("*.py"):
            copy = tmp_path / package / file.relative_to(ROOT / folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    return tmp_path


def lint(packages: Path) -> tuple[int, str]:
    """import-linter's exit code and what it prints."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo", str(PYPROJECT)]
    done = subprocess.run(command, cwd=packages, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def layers() -> list[list[str]]:
    """From top to bottom; those of one list may import each other."""
    contracts = api.read_configuration(str(PYPROJECT))["contracts_options"]
    (rows,) = (contract["layers"] for contract in contracts if contract["id"] == "layers")
    return [[name.strip() for name in row.split(":")] for row in rows]


def test_imports_run_downwards_and_in_no_circles(packages: Path) -> None:
    code, text = lint(packages)
    assert code == 0, text


UPWARD = {
    "at the top": "from gf_tvm.nn import filter_model\n",
    "in a function": "def late():\n    from ..nn import filter_model\n    return filter_model\n",
    "for types alone": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .. import nn\n",
}


@pytest.mark.parametrize("code", UPWARD.values(), ids=list(UPWARD))
def test_an_upward_import_is_told_by_both_names(packages: Path, code: str) -> None:
    with (packages / "gf_tvm/core/geometry.py").open("a") as file:
        file.write(code)
    exit_code, text = lint(packages)
    assert exit_code == 1
    # By way of whichever module of nn's is the shortest.
    assert re.search(r"gf_tvm\.core is not allowed to import gf_tvm\.nn", text), text
    assert "gf_tvm.core.geometry -> gf_tvm.nn" in text


def test_a_circle_of_modules_in_one_folder_is_told(packages: Path) -> None:
    with (packages / "gf_tvm/core/geometry.py").open("a") as file:
        file.write("def late():\n    from .workload import Workload\n    return Workload\n")
    code, text = lint(packages)
    assert code == 1
    assert "No cycles are allowed in gf_tvm.core" in text


def test_a_folder_without_a_layer_is_told(packages: Path) -> None:
    (packages / "gf_tvm/news").mkdir()
    (packages / "gf_tvm/news/__init__.py").write_text("")
    code, text = lint(packages)
    assert code == 1
    assert "news" in text


def strings(file: Path) -> Iterator[str]:
    """The strings of a module, its docstrings left out."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    described = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in described:
            yield node.value


def named(text: str) -> Iterator[str]:
    """Modules that a string names to have them imported: as a whole, or in code."""
    if re.fullmatch(r"gf_tvm(\.\w+)+(:\w+)?", text):
        yield text.partition(":")[0]
    yield from re.findall(r"(?:from|import) (gf_tvm(?:\.\w+)+)", text)


def test_no_string_names_a_module_of_a_higher_layer(packages: Path) -> None:
    height = {name: -index for index, row in enumerate(layers()) for name in row}
    seen, wrong = 0, []
    for file in sorted((packages / "gf_tvm").rglob("*.py")):
        own = file.relative_to(packages / "gf_tvm").parts[0].removesuffix(".py")
        for text in strings(file):
            for module in named(text):
                there = module.split(".")[1]
                if own in height and there in height and module not in NOT_IMPORTED:
                    seen += 1
                    if height[there] > height[own]:
                        wrong.append(f"{file.relative_to(packages)} names {module}")
    assert not wrong
    assert seen  # the doctor's code for other processes, at least


def test_the_architecture_page_shows_the_same_layers() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    table = page[page.index("## Layers") : page.index("## Words")]
    shown = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in table.splitlines() if line.startswith("| `")]
    assert shown == layers()
