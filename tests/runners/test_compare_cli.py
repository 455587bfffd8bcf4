"""gf-tvm compare and gf-tvm build from the command line: whole runs on small convolutions, and users' mistakes."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import known_limits
import pytest
import torch

from gf_tvm import building as bundle_module
from gf_tvm.bundle import library as library_module
from gf_tvm.bundle.cpu_library import CpuKernel
from gf_tvm.bundle.library import load
from gf_tvm.comparison.steps import VARIANTS
from gf_tvm.machine.profiles import get_profile
from gf_tvm.runners.cli import main

pytestmark = pytest.mark.usefixtures("host")

SHAPES = {
    "n": 2, "kernel": 3, "padding": 1, "patches": [2, 4],
    "cases": [{"ci": 4, "co": 8, "h": 9, "w": 8}, {"name": "depthwise", "ci": 4, "co": 4, "h": 8, "w": 8, "groups": 4}],
}  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    known_limits.install(monkeypatch)
    monkeypatch.chdir(tmp_path)
    Path("shapes.json").write_text(json.dumps(SHAPES))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kernels of the first case with a patch of 2."""
    folder = tmp_path_factory.mktemp("bundle")
    (folder / "shapes.json").write_text(json.dumps(SHAPES))
    command = ["build", "--shapes", str(folder / "shapes.json"), "--cases", "1", "--patch", "2"]
    assert main([*command, "--out", str(folder / "small.gfb")]) == 0
    return folder / "small.gfb"


def fails(capsys: pytest.CaptureFixture[str], *command: Any) -> str:
    """Run a command that must fail for a user's mistake; return its one line."""
    before = sorted(Path().rglob("*"))
    assert main([str(word) for word in command]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    assert sorted(Path().rglob("*")) == before  # nothing half-written
    return err


def test_compare_builds_measures_and_writes(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compare", "--device", "host", "--shapes", "shapes.json", "--seconds", "0", "--threads", "1"]
    assert main([*command, "--json", "rows.json", "--plot", "rows.png"]) == 0
    out = capsys.readouterr().out
    document = json.loads(Path("rows.json").read_text())
    names = ["4-8x9x8", "4-8x9x8", "depthwise", "depthwise"]
    assert [row["name"] for row in document["rows"]] == names
    assert [row["patch"] for row in document["rows"]] == [[2, 2], [4, 4]] * 2
    assert {row["schedule"] for row in document["rows"]} <= {"default", "tuned"}
    assert {row["device"] for row in document["rows"]} == {get_profile("host").name}
    assert all(0 < row["max_rel_error"] < 1e-5 for row in document["rows"])
    assert document["threads"] == 1
    for word in (*names, "R2", "R4", "exact", "geometric mean of 2 R2 rows", "geometric mean of 2 R4 rows"):
        assert word in out
    assert Path("rows.png").read_bytes().startswith(b"\x89PNG")


def test_compare_with_a_library_that_lacks_kernels(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compare", "--shapes", "shapes.json", "--patch", "2", "--seconds", "0", "--library", str(bundle)]
    assert main([*command, "--json", "rows.json"]) == 0
    rows = json.loads(Path("rows.json").read_text())["rows"]
    assert [row["schedule"] for row in rows] == ["default", "torch"]
    assert rows[1]["gf_tvm_ms"] == rows[1]["reference_ms"]
    assert "1 of 2 rows ran plain PyTorch operators" in capsys.readouterr().out


def test_compare_a_model() -> None:
    command = [
        "compare",
        "--model",
        "resnet18_025",
        "--input",
        "1x3x16x16",
        "--last",
        "2",
        "--no-steps",
        "--patch",
        "2",
    ]
    assert main([*command, "--no-steps", "--seconds", "0", "--json", "rows.json"]) == 0
    (row,) = json.loads(Path("rows.json").read_text())["rows"]
    assert row["name"].endswith(" x2")
    assert len(row["layers"]) == 2


@pytest.mark.slow  # a process for each variant
def test_compare_chains(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    eager = replace(VARIANTS["compiled"], make=lambda model, *_: torch.compile(model, backend="eager"))
    monkeypatch.setitem(VARIANTS, "compiled", eager)
    command = ["compare", "--model", "resnet18_025", "--input", "1x3x16x16", "--last", "2", "--patch", "2"]
    assert main([*command, "--seconds", "0", "--threads", "1", "--json", "rows.json"]) == 0
    out = capsys.readouterr().out
    document = json.loads(Path("rows.json").read_text())
    assert len(document["rows"]) == 1
    (row,) = document["chains"]
    assert row["convolutions"] == ["layer4.1.conv1", "layer4.1.conv2"]
    assert row["name"] == "layer4.1.conv1 to layer4.1.conv2"
    # The library was built for both variants.
    assert (row["schedule"], row["filtered_schedule"]) == ("default", "default")
    assert row["kernels"] == {"filtered": {"default": 2}, "chained": {"default": 3}}
    assert 0 < row["max_rel_error"] < 1e-5
    (step,) = document["steps"]
    assert list(step["step_ms"]) == list(VARIANTS)
    assert all(peak > 0 for peak in step["step_peak_bytes"].values())
    assert out.index("Whole training steps") < out.index("Backward pass") < out.index("Chains:")
    assert row["name"] in out
    assert "in place of" not in out


@pytest.mark.filterwarnings("ignore::gf_tvm.FallbackWarning")
def test_compare_chains_with_a_library_that_lacks_kernels(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "compare",
        "--model",
        "resnet18_025",
        "--input",
        "1x3x16x16",
        "--last",
        "2",
        "--no-steps",
        "--patch",
        "2,7",
    ]
    assert main([*command, "--no-steps", "--seconds", "0", "--library", str(bundle), "--json", "rows.json"]) == 0
    rows = json.loads(Path("rows.json").read_text())["chains"]
    assert [row["schedule"] for row in rows] == ["torch", "torch"]
    assert "R2: plain PyTorch operators ran in place of 2 of 2 filtered and 3 of 3 chained" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--no-chain"], ["--cases", "1"]])
def test_compare_single_convolutions_only(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compare", "--model", "resnet18_025", "--input", "1x3x16x16", "--last", "2", "--patch", "2", *options]
    assert main([*command, "--seconds", "0", "--json", "rows.json"]) == 0
    document = json.loads(Path("rows.json").read_text())
    assert (len(document["rows"]), document["chains"]) == (1, [])
    assert "chained" not in capsys.readouterr().out


def test_what_chains_need(capsys: pytest.CaptureFixture[str]) -> None:
    model = ["compare", "--model", "resnet18_025", "--input", "1x3x16x16"]
    assert "last must be between 1 and" in fails(capsys, *model, "--last", "99")
    assert "--model needs --input NxCxHxW and --last K" in fails(capsys, *model)


@pytest.mark.parametrize("options", [["--no-chain"], ["--cases", "1"], []])
def test_build_of_a_model(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """What its chains call is built unless single convolutions are asked for."""
    command = ["build", "--model", "resnet18_025", "--input", "1x3x16x16", "--last", "2", "--patch", "2", *options]
    assert main([*command, "--out", "new.gfb", "--json", "built.json"]) == 0
    document = json.loads(Path("built.json").read_text())
    kernels = {kernel["workload"]["kernel"] for kernel in document["kernels"]}
    assert {"filter_input", "backward"} <= kernels  # what it calls without chains
    assert (kernels >= {"input_grad", "weight_grad"}) == ("--no-chain" not in options)
    kinds = {program.partition("_")[0] for program in document["programs"]}
    wanted = {"convolution", "forward"} if options == ["--no-chain"] else {"convolution", "forward", "chain"}
    assert kinds == (set() if "--cases" in options else wanted)
    assert ("programs" in capsys.readouterr().out) == bool(kinds)


def test_build_says_what_it_built(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["build", "--shapes", "shapes.json", "--cases", "depthwise", "--patch", "2"]
    assert main([*command, "--out", "new.gfb", "--json", "built.json"]) == 0
    out = capsys.readouterr().out
    document = json.loads(Path("built.json").read_text())
    assert [kernel["workload"]["kernel"] for kernel in document["kernels"]] == ["filter_input", "backward"]
    assert {kernel["schedule"] for kernel in document["kernels"]} == {"default"}
    assert all(kernel["reason"] for kernel in document["kernels"])
    assert "new.gfb: 2 kernels" in out
    assert "2 default" in out
    assert load("new.gfb").digest in library_module._loaded


def test_build_for_a_model_has_what_its_first_layer_needs() -> None:
    command = ["build", "--model", "resnet18_025", "--input", "1x3x16x16", "--last", "1", "--patch", "2"]
    assert main([*command, "--out", "model.gfb"]) == 0
    kernels = ["filter_input", "backward", "backward_weight", "input_grad", "weight_grad"]
    assert [w.kernel for w in load("model.gfb").workloads] == kernels


def test_a_wrong_kernel_ends_in_one_line(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = CpuKernel.__call__

    def wrong(self: CpuKernel, *tensors: torch.Tensor) -> None:
        right(self, *tensors)
        if self.workload.kernel == "backward":
            tensors[-3].mul_(1.01)

    monkeypatch.setattr(CpuKernel, "__call__", wrong)
    line = fails(
        capsys, "compare", "--shapes", "shapes.json", "--cases", "1", "--patch", "2", "--library", bundle, "--json", "a"
    )
    assert "grad_x of gf_tvm is wrong, so it was not timed" in line


@pytest.mark.parametrize("command", [("compare",), ("build", "--out", "new.gfb")], ids=lambda words: words[0])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--shapes", "shapes.json", "--patch", "0"), "patch must be at least 1, got 0"),
        (("--shapes", "shapes.json", "--patch=-2"), "patch must be at least 1, got -2"),
        (("--shapes", "shapes.json", "--patch", "two"), "got 'two'"),
        (("--shapes", "missing.json"), "missing.json: cannot read"),
        (("--shapes", "broken.json"), "broken.json: not JSON"),
        (("--shapes", "wrong.json"), "wrong.json: case 1: h must be"),
        (("--shapes", "shapes.json", "--cases", "9"), "no case '9'; cases: 1 4-8x9x8, 2 depthwise"),
        (("--shapes", "shapes.json", "--last", "2"), "--model"),
        (("--shapes", "shapes.json", "--device", "nonsense"), "unknown device 'nonsense'; known: host"),
        (("--shapes", "shapes.json", "--logs", "nowhere"), "no folder of tuning logs 'nowhere'"),
        (("--shapes", "shapes.json", "--json", "nowhere/rows.json"), "cannot write 'nowhere/rows.json'"),
        (("--model", "nonsense", "--input", "1x3x8x8", "--last", "1"), "unknown model 'nonsense'; known: mobilenetv2"),
        (("--model", "resnet18_025", "--last", "1"), "--input"),
        (("--model", "resnet18_025", "--input", "1x3x8x8"), "--last"),
        (("--model", "resnet18_025", "--input", "3x8x8", "--last", "1"), "NxCxHxW"),
        (("--model", "resnet18_025", "--input", "1x3x16x16", "--last", "0"), "last must be between 1 and 20"),
        (("--model", "resnet18_025", "--input", "1x3x16x16", "--last", "99"), "last must be between 1 and 20"),
        (("--model", "torch.nn:Flatten", "--input", "1x3x8x8", "--last", "1"), "has no Conv2d module"),
        ((), "required"),
    ],
)
def test_mistakes(
    command: tuple[str, ...], options: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("broken.json").write_text("{")
    Path("wrong.json").write_text(json.dumps({**SHAPES, "cases": [{"ci": 4, "co": 4, "h": -1, "w": 4}]}))
    assert said in fails(capsys, *command, *options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--library", "missing.gfb"), "missing.gfb"),
        (("--library", "shapes.json"), "shapes.json"),
        (("--threads", "0"), "threads must be at least 1, got 0"),
        (("--seconds", "-1"), "seconds must be"),
        (("--seconds", "nan"), "seconds must be"),
        (("--plot", "nowhere/rows.png"), "cannot write 'nowhere/rows.png'"),
        (("--plot", "rows.txt"), "must end in .png"),
    ],
)
def test_mistakes_of_compare(
    options: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle_module, "build", lambda *_: pytest.fail("was built before the mistake was seen"))
    assert said in fails(capsys, "compare", "--shapes", "shapes.json", *options)


def test_out_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    for out in ("nowhere/new.gfb", "."):
        assert "cannot write" in fails(capsys, "build", "--shapes", "shapes.json", "--out", out)
    # As root, a rename would replace the device by a file.
    assert "not a regular file" in fails(capsys, "build", "--shapes", "shapes.json", "--out", "/dev/null")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_mistakes_leave_the_old_bundle_alone(capsys: pytest.CaptureFixture[str]) -> None:
    Path("old.gfb").write_bytes(b"old")
    fails(capsys, "build", "--shapes", "shapes.json", "--patch", "0", "--out", "old.gfb")
    assert Path("old.gfb").read_bytes() == b"old"
