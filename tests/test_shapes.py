"""Cases of the paper, of shapes files (also broken ones) and of models; workloads; texts of the command line."""

from __future__ import annotations

import codecs
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gf_tvm.core.geometry import Geometry
from gf_tvm.errors import GeometryError, GfTvmError, ModelError
from gf_tvm.nn import filter_model
from gf_tvm.ops import operators
from gf_tvm.ops.dispatch import FallbackWarning
from gf_tvm.shapes import (
    Case,
    format_patch,
    last_to_run,
    load_cases,
    model_cases,
    paper_cases,
    parse_input,
    parse_patches,
    pick_cases,
    workloads_of,
)

HEAD: dict[str, Any] = {"n": 2, "kernel": 3, "stride": 1, "padding": 1, "dtype": "float32", "patches": [2]}
CASE = {"ci": 4, "co": 6, "h": 8, "w": 9}


def write(folder: Path, content: Any) -> Path:
    path = folder / "shapes.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_paper_cases() -> None:
    cases = paper_cases()
    assert len(cases) == 14
    assert [c.geometry.patch for c in cases[:2]] == [(2, 2), (4, 4)]
    assert cases[0].geometry == Geometry(32, 128, 128, 120, 160, (3, 3), (2, 2), padding=(1, 1))
    assert cases[-1].geometry == Geometry(32, 64, 64, 56, 56, (3, 3), (4, 4), padding=(1, 1))
    assert {c.dtype for c in cases} == {"float32"}
    assert len({c.name for c in cases}) == 7
    assert {c.geometry.patch for c in paper_cases([7])} == {(7, 7)}


def test_shapes_need_no_tvm() -> None:
    code = "import sys, gf_tvm.shapes; sys.exit('tvm' in sys.modules or 'xgboost' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


def test_cases_of_files_need_no_torch() -> None:
    code = "import sys; from gf_tvm.shapes import paper_cases, workloads_of; workloads_of(paper_cases()); "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


def test_case_overrides_every_field_of_the_head(tmp_path: Path) -> None:
    own = {
        "name": "own", "n": 3, "ci": 8, "co": 16, "h": 10, "w": 11, "kernel": [3, 5], "stride": [1, 2],
        "padding": [0, 2], "dilation": 2, "groups": 4, "dtype": "bfloat16", "patches": [[2, 1], 3],
    }  # fmt: skip
    first, *others = load_cases(write(tmp_path, {"source": "text", **HEAD, "cases": [CASE, own]}))
    assert first == Case("4-6x8x9", Geometry(2, 4, 6, 8, 9, (3, 3), (2, 2), padding=(1, 1)), "float32")
    geometry = Geometry(3, 8, 16, 10, 11, (3, 5), (2, 1), (1, 2), (0, 2), (2, 2), 4)
    assert [(c.name, c.dtype) for c in others] == [("own", "bfloat16")] * 2
    assert others[0].geometry == geometry
    assert others[1].geometry.patch == (3, 3)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    path = write(tmp_path, {**HEAD, "cases": [CASE]})
    cases = load_cases(path)
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes().replace(b"\n", b"\r\n"))
    assert load_cases(path) == cases


def test_patches_of_the_caller_replace_those_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, {**HEAD, "cases": [CASE, {**CASE, "h": 12, "patches": [7]}]})
    assert [c.geometry.patch for c in load_cases(path, [4, (2, 1)])] == [(4, 4), (2, 1)] * 2


def test_equal_default_names_are_told_apart(tmp_path: Path) -> None:
    cases = load_cases(write(tmp_path, {**HEAD, "cases": [CASE, {**CASE, "kernel": 1, "padding": 0}]}))
    assert [c.name for c in cases] == ["4-6x8x9", "4-6x8x9#2"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", ["not JSON"]),
        ("[]", ["'cases'"]),
        ("[" * 100000, ["not JSON"]),
        ({**HEAD}, ["'cases'"]),
        ({**HEAD, "cases": []}, ["'cases'"]),
        ({**HEAD, "cases": {}}, ["'cases'"]),
        ({**HEAD, "cases": [CASE, 3]}, ["case 2", "object"]),
        ({**HEAD, "patch": 2, "cases": [CASE]}, ["head", "'patch'", "patches"]),
        ({**HEAD, "cases": [CASE, {**CASE, "strides": 2}]}, ["case 2", "'strides'"]),
        ({**HEAD, "cases": [{"ci": 4, "co": 4, "h": 8}]}, ["case 1", "'w'"]),
        ({**HEAD, "cases": [{**CASE, "h": "8"}]}, ["case 1", "h must", "'8'"]),
        ({**HEAD, "cases": [{**CASE, "h": 8.0}]}, ["case 1", "h must", "8.0"]),
        ({**HEAD, "cases": [{**CASE, "h": None}]}, ["case 1", "h must"]),
        ({**HEAD, "cases": [{**CASE, "n": 0}]}, ["case 1", "n must"]),
        ({**HEAD, "cases": [{**CASE, "n": -1}]}, ["case 1", "n must"]),
        ({**HEAD, "cases": [{**CASE, "kernel": [3, 3, 3]}]}, ["case 1", "kernel"]),
        ({**HEAD, "cases": [{**CASE, "kernel": 20}]}, ["case 1", "20x20 kernel"]),
        ({**HEAD, "cases": [{**CASE, "stride": 0}]}, ["case 1", "stride"]),
        ({**HEAD, "cases": [{**CASE, "groups": 4}]}, ["case 1", "groups=4", "co=6"]),
        ({**HEAD, "cases": [{**CASE, "dtype": "complex64"}]}, ["case 1", "complex64", "float32"]),
        ({**HEAD, "cases": [{**CASE, "dtype": ["float32"]}]}, ["case 1", "dtype"]),
        ({**HEAD, "cases": [{**CASE, "patches": 2}]}, ["case 1", "patches"]),
        ({**HEAD, "cases": [{**CASE, "patches": []}]}, ["case 1", "patches"]),
        ({**HEAD, "cases": [{**CASE, "patches": [2, 0]}]}, ["case 1", "patch", "0"]),
        ({**HEAD, "cases": [{**CASE, "name": ""}]}, ["case 1", "name"]),
        ({**HEAD, "cases": [{**CASE, "name": "a\nb"}]}, ["case 1", "name"]),
        ({**HEAD, "cases": [{**CASE, "name": "a"}, {**CASE, "name": "a"}]}, ["case 2", "'a'", "case 1"]),
        ({"n": 1, "kernel": 1, "cases": [CASE]}, ["case 1", "'patches'"]),
    ],
)
def test_bad_shapes_file_is_one_clear_line(tmp_path: Path, content: Any, said: list[str]) -> None:
    path = write(tmp_path, content)
    with pytest.raises(GeometryError) as caught:
        load_cases(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300
    for text in (str(path), *said):
        assert text in message


def test_unreadable_shapes_file(tmp_path: Path) -> None:
    with pytest.raises(GeometryError, match=r"missing\.json.*No such file"):
        load_cases(tmp_path / "missing.json")
    with pytest.raises(GeometryError, match="directory"):
        load_cases(tmp_path)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(GeometryError, match="UTF-8"):
        load_cases(tmp_path / "binary.json")


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=4))
def test_any_value_in_a_field_is_taken_or_refused_in_one_line(value: Any) -> None:
    import tempfile

    for field in ("n", "ci", "kernel", "stride", "padding", "dilation", "groups", "dtype", "patches", "name"):
        with tempfile.TemporaryDirectory() as folder:
            path = write(Path(folder), {**HEAD, "cases": [{**CASE, field: value}]})
            try:
                cases = load_cases(path)
            except GfTvmError as error:
                assert "case 1" in str(error)  # noqa: PT017
                assert "\n" not in str(error)  # noqa: PT017
            else:
                assert cases
                assert all(case.geometry.n >= 1 for case in cases)


class Block(nn.Module):
    """A residual block with a projection, as in ResNet."""

    def __init__(self, ci: int, co: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(ci, co, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(co)
        self.conv2 = nn.Conv2d(co, co, 3, 1, 1)
        self.shortcut = nn.Conv2d(ci, co, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv2(torch.relu(self.bn1(self.conv1(x)))) + self.shortcut(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.a = Block(8, 16, 2)
        self.b = Block(16, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.b(self.a(self.drop(self.stem(x)))).mean((2, 3)))
        return out


def test_model_cases_see_the_shapes_of_the_forward_pass() -> None:
    cases = model_cases(Net(), (2, 3, 16, 12), layers=["stem", "a.conv1", "a.shortcut"], patches=[2, (4, 2)])
    assert [c.layers for c in cases[::2]] == [("stem",), ("a.conv1",), ("a.shortcut",)]
    assert [c.geometry.patch for c in cases] == [(2, 2), (4, 2)] * 3
    assert cases[0].geometry == Geometry(2, 3, 8, 16, 12, (3, 3), (2, 2), padding=(1, 1))
    assert cases[2].geometry == Geometry(2, 8, 16, 16, 12, (3, 3), (2, 2), (2, 2), (1, 1))
    assert cases[4].geometry == Geometry(2, 8, 16, 16, 12, (1, 1), (2, 2), (2, 2))


def test_equal_layers_of_a_model_are_one_case() -> None:
    cases = model_cases(Net(), (2, 3, 16, 16), layers=["a.conv2", "b.conv1", "b.conv2"], patches=[2])
    assert [(c.name, c.layers) for c in cases] == [("a.conv2 x3", ("a.conv2", "b.conv1", "b.conv2"))]


def test_first_layers_are_those_whose_input_needs_no_gradient() -> None:
    # a.shortcut runs after a.conv2, but what it reads lies before everything that is trained
    cases = model_cases(Net(), (1, 3, 8, 8), layers=["a.conv2", "a.shortcut", "b.shortcut"], patches=[2])
    assert {c.layers[0]: c.first for c in cases} == {"a.conv2": True, "a.shortcut": True, "b.shortcut": False}
    # one of three equal layers is enough for the merged case
    merged = model_cases(Net(), (1, 3, 8, 8), layers=["a.conv2", "b.conv1", "b.conv2"], patches=[2])
    assert [c.first for c in merged] == [True]


def test_model_is_left_as_it_was() -> None:
    model = Net().train()
    model.a.eval()
    model.stem.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    model_cases(model, (2, 3, 8, 8), last=3, patches=[2])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_model_is_left_as_it_was_when_it_fails() -> None:
    model = Net().train()
    with pytest.raises(ModelError, match=r"Net does not run on an input of shape 2x4x8x8: .*channels"):
        model_cases(model, (2, 4, 8, 8), last=2, patches=[2])
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert all(m.training for m in model.modules())


def test_model_of_another_dtype() -> None:
    cases = model_cases(Net().bfloat16(), (1, 3, 8, 8), last=1, patches=[2])
    assert [c.dtype for c in cases] == ["bfloat16"]
    with pytest.raises(ModelError, match=r"float64.*float32"):
        model_cases(Net().double(), (1, 3, 8, 8), last=1, patches=[2])


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({"padding": "same"}, (1, 3, 9, 8)),
        ({"padding": "same", "dilation": (2, 3)}, (1, 3, 9, 8)),
        ({"padding": "valid"}, (2, 3, 9, 8)),
        ({"padding": (2, 1), "padding_mode": "reflect"}, (1, 3, 9, 8)),
        ({"padding": "same", "padding_mode": "circular"}, (1, 3, 9, 8)),
        ({"padding": 1, "stride": (2, 1)}, (1, 3, 9, 8)),
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_geometry_is_the_one_that_the_operator_sees(
    settings: dict[str, Any], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    conv = nn.Conv2d(3, 4, (4, 3), **settings)
    (case,) = model_cases(conv, shape, last=1, patches=[(2, 3)])
    seen = []
    real = operators.make_geometry
    monkeypatch.setattr(operators, "make_geometry", lambda *arguments: seen.append(real(*arguments)) or seen[-1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        filter_model(conv, patch=(2, 3), last=1)(torch.zeros(shape)).sum().backward()
    assert set(seen) == {case.geometry}


def test_layers_with_forward_passes_of_their_own() -> None:
    """What they give to the convolution counts, which may be padded in another way than the module says."""

    class Same(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.zeros(2, 4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.kernel, padding="same")

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Same(4, 4, 3, stride=2), Functional())
    cases = model_cases(model, (1, 3, 8, 8), layers=["0", "1", "2"], patches=[2])
    assert [(c.layers, c.geometry.h, c.geometry.kernel, c.geometry.stride, c.geometry.padding) for c in cases] == [
        (("0",), 8, (3, 3), (1, 1), (0, 0)),
        (("1",), 7, (3, 3), (2, 2), (0, 0)),
        (("2",), 3, (1, 1), (1, 1), (0, 0)),
    ]


class Backwards(nn.Module):
    """Registered in another order than run."""

    def __init__(self) -> None:
        super().__init__()
        self.third = nn.Conv2d(6, 7, 3)
        self.first = nn.Conv2d(3, 5, 3)
        self.unused = nn.Conv2d(1, 1, 1)
        self.second = nn.Conv2d(5, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.second(self.first(x)))


@pytest.mark.parametrize(
    ("last", "names"), [(1, ["third"]), (2, ["second", "third"]), (4, ["unused", "first", "second", "third"])]
)
def test_the_last_layers_are_the_last_to_run(last: int, names: list[str]) -> None:
    assert last_to_run(Backwards(), last, (1, 3, 8, 8)) == names
    cases = model_cases(Backwards(), (1, 3, 8, 8), last=last)
    assert [case.name for case in cases] == [name for name in names if name != "unused"]


def test_no_more_layers_than_there_are() -> None:
    with pytest.raises(ModelError, match="between 1 and 4"):
        last_to_run(Backwards(), 5, (1, 3, 8, 8))


def test_layers_that_never_run(caplog: pytest.LogCaptureFixture) -> None:
    class Idle(Net):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Conv2d(3, 3, 1)

    cases = model_cases(Idle(), (1, 3, 8, 8), layers=["stem", "unused"], patches=[2])
    assert "does not use: unused" in caplog.text
    assert [c.layers for c in cases] == [("stem",)]
    with pytest.raises(ModelError, match="unused"):
        model_cases(Idle(), (1, 3, 8, 8), layers=["unused"], patches=[2])


@pytest.mark.parametrize("patches", [[0], [-1], [], [2.5], "2", [(1, 2, 3)]])
def test_bad_patches(patches: Any) -> None:
    with pytest.raises(GeometryError, match="patch"):
        model_cases(Net(), (1, 3, 8, 8), last=1, patches=patches)
    with pytest.raises(GeometryError, match="patch"):
        paper_cases(patches)


def test_workloads() -> None:
    a, b = (Geometry(1, c, c, 8, 8, (3, 3), (2, 2)) for c in (2, 4))
    cases = [Case("a", a), Case("b", b, first=True), Case("again", a), Case("half", a, "float16")]
    assert [(w.kernel, w.geometry, w.dtype) for w in workloads_of(cases)] == [
        ("filter_input", a, "float32"),
        ("backward", a, "float32"),
        ("filter_input", b, "float32"),
        ("backward", b, "float32"),
        ("backward_weight", b, "float32"),
        ("filter_input", a, "float16"),
        ("backward", a, "float16"),
    ]
    assert [w.kernel for w in workloads_of(cases[1:2], chained=True)] == [
        "filter_input",
        "backward",
        "backward_weight",
        "input_grad",
        "weight_grad",
    ]


def test_parse_input() -> None:
    assert parse_input("8x3x32x64") == (8, 3, 32, 64)
    for text in ("", "8x3x32", "8x3x32x0", "8x3x32x-2", "8,3,32,32", "axbxcxd", "8x3x32x32x1", "1x1x1x" + "9" * 9999):
        with pytest.raises(GeometryError, match="NxCxHxW"):
            parse_input(text)


def test_parse_patches() -> None:
    assert parse_patches("2,4") == [(2, 2), (4, 4)]
    assert parse_patches(" 2x1, 4 ,2x1") == [(2, 1), (4, 4)]
    for text in ("0", "-1", "2,0", "2x0"):
        with pytest.raises(GeometryError, match="patch must be at least 1"):
            parse_patches(text)
    for text in ("", "2,", "two", "2x3x4", "2.5", "٢"):
        with pytest.raises(GeometryError, match="patches are written"):
            parse_patches(text)


def test_pick_cases() -> None:
    cases = paper_cases()
    assert [c.name for c in pick_cases(cases, "4-5")] == ["512x14x14"] * 2 + ["256x14x14"] * 2
    assert [c.name for c in pick_cases(cases, "7,512x14x14")] == ["512x14x14"] * 2 + ["64x56x56"] * 2
    assert len(pick_cases(cases, "*x14x14")) == 4
    for text in ("0", "8", "5-4", "6-8", "nothing", "", "1,,2"):
        with pytest.raises(GeometryError, match=r"no case .*1 128x120x160.*7 64x56x56"):
            pick_cases(cases, text)


def test_format_patch() -> None:
    assert (format_patch((2, 2)), format_patch((2, 1))) == ("R2", "R2x1")
