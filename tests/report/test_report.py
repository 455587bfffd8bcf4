"""gf-tvm report: the page's figures are those of the files, it needs nothing else, and users' mistakes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import known_limits
import pytest
from checkout import ROOT
from report_files import Page, chains, comparison, evaluation, training, tuning

from gf_tvm.errors import ReportError
from gf_tvm.report.exhibits import Exhibit
from gf_tvm.report.page import numbered, render, sections_of, write_report
from gf_tvm.report.sources import read, read_all
from gf_tvm.runners.cli import main
from gf_tvm.shapes import format_patch

MAKERS: dict[str, Callable[[], dict[str, Any]]] = {
    "compare.json": comparison,
    "evaluate.json": evaluation,
    "train.json": training,
    "tune.json": tuning,
}


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def save(name: str, document: Any) -> str:
    Path(name).write_text(json.dumps(document))
    return name


def parts_of(*names: str) -> dict[str, Exhibit]:
    return {part.name: part for section in sections_of(read_all(names)) for part in section.exhibits}


def page_of(*names: str | Path) -> Page:
    """The page of these files, without its pictures: drawing them takes much longer than all else."""
    sections = numbered(sections_of(read_all(names)))
    images = {part.name: "#" for section in sections for part in section.exhibits}
    return Page(render(sections, images, "Title", [str(name) for name in names]))


def numbers(cell: tuple[str, list[float]], scale: float = 1.0) -> list[float]:
    """A cell's numbers as in the file; what is written must be the same, to the digits that are written."""
    text, values = cell
    written = [float(part.rstrip("x")) for part in text.split(", ")]
    assert written == pytest.approx([scale * value for value in values], rel=6e-3, abs=6e-5 if scale == 1 else 6e-3)
    return values


def test_whole_page(capsys: pytest.CaptureFixture[str]) -> None:
    files = [save(name, make()) for name, make in MAKERS.items()]
    assert main(["report", *files, "--out", "a/report", "--title", "What it gains"]) == 0
    assert "index.html" in capsys.readouterr().out
    html = Path("a/report/index.html").read_text()
    page = Page(html)
    # Alone it is complete: no script, and nothing is fetched; pictures beside it are only linked.
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "@import" not in html
    assert "url(" not in html
    for address in page.addresses:
        beside = address.endswith((".svg", ".png")) and (Path("a/report") / address).stat().st_size > 1000
        assert address.startswith(("#", "data:image/svg+xml;base64,")) or beside
    pictures = {path.stem for path in Path("a/report").glob("*.svg")}
    assert pictures == set(page.tables)
    assert {path.stem for path in Path("a/report").glob("*.png")} == pictures
    assert not list(Path("a/report").glob(".*"))
    for word in ("What it gains", "Some CPU", "torch 2.13.0", "measured", "batch 32", "It keeps the least", *files):
        assert word in page.text
    assert "onednn None" not in page.text
    first = {path.name: path.read_bytes() for path in Path("a/report").iterdir()}
    write_report(files[-1:], "b")
    assert Path("b/tuning.svg").read_bytes() == first["tuning.svg"]
    assert Path("b/tuning.png").read_bytes() == first["tuning.png"]


def test_page_equals_comparison() -> None:
    # Measured ones, too: the rows of the benchmark have more columns.
    real = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())
    for document in (comparison(), real):
        page = page_of(save("compare.json", document))
        speed, memory, roofline = (page.rows(name) for name in ("speedup", "memory", "roofline"))
        for row, a, b, c in zip(document["rows"], speed, memory, roofline, strict=True):
            for table in (a, b, c):
                assert (table["convolution"][0], table["patch"][0]) == (row["name"], format_patch(row["patch"]))
            for header, column in (("exact", "baseline"), ("plain", "reference"), ("gf_tvm", "gf_tvm")):
                assert numbers(a[f"{header} ms"]) == [row[f"{column}_ms"]]
            assert numbers(a["limit ms"]) == [row["roofline_ms"]]
            assert numbers(a["speedup of gf_tvm"]) == [row["baseline_ms"] / row["gf_tvm_ms"]]
            assert numbers(b["exact MB"], 1e-6) == [row["saved_bytes_baseline"]]
            assert numbers(b["filtered MB"], 1e-6) == [row["saved_bytes_gf_tvm"]]
            assert numbers(c["gf_tvm GFLOP/s"])[0] * row["gf_tvm_ms"] * 1e6 == pytest.approx(c["GFLOP"][1][0])
            assert c["GFLOP"][1] == [row.get("operations", c["GFLOP"][1][0])]
            assert c["MB moved"][1] == [row.get("moved_bytes", c["MB moved"][1][0])]


def test_bars_are_the_comparison() -> None:
    document = comparison()
    parts = parts_of(save("compare.json", document))
    drawn = sorted(bar.get_width() + 1 for axes in parts["speedup"].figure.axes for bar in axes.patches)
    rows = document["rows"]
    expected = sorted(row["baseline_ms"] / row[name] for row in rows for name in ("reference_ms", "gf_tvm_ms"))
    assert drawn == pytest.approx(expected)
    (axes,) = parts["memory"].figure.axes
    drawn = sorted(1e6 * bar.get_width() for bar in axes.patches)
    exact = {row["name"]: row["saved_bytes_baseline"] for row in rows}
    assert drawn == pytest.approx(sorted([*exact.values(), *(row["saved_bytes_gf_tvm"] for row in rows)]))


def test_chains_of_a_comparison() -> None:
    document = chains()
    alone = save("chains.json", document)
    made = parts_of(alone)
    assert list(made) == ["chain-speedup", "chain-memory"]
    page = page_of(alone)
    for row, a, b in zip(document["chains"], page.rows("chain-speedup"), page.rows("chain-memory"), strict=True):
        assert a["chain"][0] == b["chain"][0] == row["name"]
        assert a["patch"][0] == b["patch"][0] == format_patch(row["patch"])
        for variant in ("exact", "filtered", "chained"):
            assert numbers(a[f"{variant} ms"]) == [row["backward_ms"][variant]]
            assert numbers(a[f"{variant} forward ms"]) == [row["forward_ms"][variant]]
            assert numbers(b[f"{variant} MB"], 1e-6) == [row["kept_bytes"][variant]]
        assert numbers(a["limit ms"]) == [row["roofline_ms"]]
        assert numbers(a["filtered / chained"]) == [row["backward_ms"]["filtered"] / row["backward_ms"]["chained"]]
        assert numbers(b["exact / chained"]) == [row["kept_bytes"]["exact"] / row["kept_bytes"]["chained"]]
    drawn = sorted(bar.get_width() + 1 for axes in made["chain-speedup"].figure.axes for bar in axes.patches)
    times = [row["backward_ms"] for row in document["chains"]]
    assert drawn == pytest.approx(sorted(ms["exact"] / ms[v] for ms in times for v in ("filtered", "chained")))
    (axes,) = made["chain-memory"].figure.axes
    kept = sorted(size / 1e6 for row in document["chains"] for size in row["kept_bytes"].values())
    assert sorted(bar.get_width() for bar in axes.patches) == pytest.approx(kept)
    assert ("Chains", "the operations of one chain") in made["chain-speedup"].conditions
    # Beside single convolutions they follow these.
    document["rows"] = comparison()["rows"]
    together = parts_of(save("both.json", document))
    assert list(together) == ["speedup", "memory", "roofline", "chain-speedup", "chain-memory"]
    assert "single convolutions and chains" in page_of("both.json").text


@pytest.mark.parametrize("chained", ["R4 chained", "R4 chained float16"])
def test_chained_settings_of_an_evaluation(chained: str) -> None:
    document = evaluation()
    document["settings"] += [{**row, "variant": chained} for row in document["settings"] if row["variant"] == "R4"]
    made = parts_of(save("evaluate.json", document))
    by_patch, by_last = made["score"].figure.axes
    assert [label.get_text() for label in by_patch.get_xticklabels()] == ["exact", "R4", chained.replace(" ", "\n", 1)]
    looks = {line.get_label(): line.lines[0] for line in by_last.containers}
    assert looks["R4"].get_color() == looks[chained].get_color() != looks["exact"].get_color()
    assert looks["R4"].get_linestyle() != looks[chained].get_linestyle()
    rows = [(row["backward"][0], row["last"][0]) for row in page_of("evaluate.json").rows("step")]
    assert rows == [(v, last) for last in ("1", "2") for v in ("exact", "R4", chained)]
    # By itself it looks like any other.
    document["settings"] = [row for row in document["settings"] if row["variant"] != "R4"]
    _, by_last = parts_of(save("evaluate.json", document))["score"].figure.axes
    assert {line.lines[0].get_linestyle() for line in by_last.containers} == {"-"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(chains=[]), "'rows' is empty: there is nothing to report"),
        (lambda d: d.update(chains={}), "'chains' must be a list of an object"),
        (
            lambda d: d["chains"][1].pop("roofline_ms"),
            "chain 2 (layer1.conv1 to layer1.conv2): 'roofline_ms' is missing",
        ),
        (
            lambda d: d["chains"][0].update(backward_ms=3),
            "chain 1 (layer1.conv1 to layer1.conv2), backward_ms: must be",
        ),
        (
            lambda d: d["chains"][0]["kept_bytes"].update(chained=0),
            "kept_bytes: 'chained' must be an integer of at least 1, got 0",
        ),
    ],
)
def test_what_is_wrong_with_chains(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    document = chains()
    change(document)
    with pytest.raises(ReportError) as error:
        read(save("chains.json", document))
    assert message in str(error.value)


def test_page_equals_evaluation() -> None:
    document = evaluation()
    name = save("evaluate.json", document)
    page = page_of(name)
    found = {(row["backward"][0], row["last"][0]): row for row in page.rows("score")}
    steps = {(row["backward"][0], row["last"][0]): row for row in page.rows("step")}
    memory = {(row["backward"][0], row["last"][0]): row for row in page.rows("training-memory")}
    assert len(found) == len(document["settings"])
    for row in document["settings"]:
        key = (row["variant"], str(row["last"]))
        assert numbers(found[key]["each seed %"], 100) == row["scores"]
        assert numbers(found[key]["mean %"], 100)[0] == pytest.approx(sum(row["scores"]) / 2)
        assert numbers(found[key]["lowest %"], 100) == [min(row["scores"])]
        for phase, ms in row["step_ms"].items():
            assert numbers(steps[key][f"{phase} ms"]) == [ms]
        assert numbers(steps[key]["backward GFLOP"], 1e-9) == [row["backward_flops"]]
        assert "energy J" not in steps[key]  # was not measured
        assert memory[key]["convolutions MB"][1] == [row["kept_bytes_convolutions"]]
        assert memory[key]["peak of the process MB"][1] == ([row["peak_bytes"]] if row["peak_bytes"] else [])
    cosines = page.rows("cosine")
    for row, layer in zip(cosines, document["layers"], strict=True):
        assert row["layer"][0] == layer["name"]
        assert numbers(row["weight"]) == [layer["cosine_weight"]]
        assert row["input"][1] == ([] if layer["cosine_input"] is None else [layer["cosine_input"]])
    assert "Recommended: R4, last 2 convolutions. It keeps the least." in page.text
    assert "at most 64 MB, accuracy at most 1 percentage points below exact" in page.text


def test_conditions_are_stated_once_and_found_from_each_figure() -> None:
    files = [save(name, make()) for name, make in MAKERS.items()]
    page = page_of(*files)
    for section in numbered(sections_of(read_all(files))):
        for part in section.exhibits:
            assert sorted(page.conditions(part.name)) == sorted(part.conditions)
    assert {
        what for name in ("score", "step", "training-memory", "cosine") for what, _ in page.stated.get(name, [])
    } == {
        *("Scores", "Step times", "Cosines"),
    }
    assert dict(page.stated["step"]) == {"Step times": "medians"}
    assert page.text.count("torch 2.13.0") == len(files) - 1  # once in a section; tuning's versions are others


def test_obstacles_are_said() -> None:
    document = evaluation()
    document["recommendation"] = None
    reasons = {"limits": "none meets the limits", "filtering": {"conv9": "padding is circular"}, "cache": "no trace"}
    document["obstacles"] = reasons
    document["settings"][1]["other_cores"] = 0.84
    text = page_of(save("evaluate.json", document)).text
    for said in (
        *("None meets the limits.", "Not filtered, exact in every setting: conv9: padding is circular."),
        *("The frozen layers are computed in every step: no trace.", "kept up to 0.8 cores busy"),
    ):
        assert said in text
    del document["obstacles"]  # a file of an earlier version
    assert "No setting meets the limits." in page_of(save("evaluate.json", document)).text


def test_the_committed_report_equals_its_files() -> None:
    folder = ROOT / "docs/report"
    page = Page((folder / "index.html").read_text())
    names = [ROOT / "benchmarks/results/cpu.json", *sorted(folder.glob("*.json"))]
    assert len(names) > 1
    fresh = page_of(*names)
    assert set(fresh.tables) <= set(page.tables)
    for part, rows in fresh.tables.items():
        assert page.tables[part] == rows, part
        assert page.conditions(part) == fresh.conditions(part), part
    for part in page.tables:
        assert (folder / f"{part}.svg").is_file()


def test_figures_of_an_evaluation() -> None:
    document = evaluation()
    parts = parts_of(save("evaluate.json", document))
    (step,) = parts["step"].figure.axes
    widths = sorted(bar.get_width() for bar in step.patches)
    assert widths == pytest.approx(sorted(ms for row in document["settings"] for ms in row["step_ms"].values()))
    by_patch, by_last = parts["score"].figure.axes
    means = sorted(50 * sum(row["scores"]) for row in document["settings"])
    for axes in (by_patch, by_last):
        drawn = sorted(y for line in axes.containers for y in line.lines[0].get_ydata())
        assert drawn == pytest.approx(means)
    assert [label.get_text() for label in by_patch.get_xticklabels()] == ["exact", "R4"]
    (cosine,) = parts["cosine"].figure.axes
    points = {round(float(x), 6) for line in cosine.lines[:-1] for x in line.get_xdata()}
    assert points == {0.8765, 0.7654, 0.4321}


def test_runs_of_several_seeds_and_layers_are_put_together() -> None:
    files = [save("a.json", training(0, 0.9)), save("b.json", training(2, 0.8)), save("c.json", training(0, 0.7, 4))]
    page = page_of(*files)
    rows = page.rows("score")
    assert [(row["backward"][0], row["last"][0]) for row in rows] == [
        *(("exact", "2"), ("R2", "2"), ("exact", "4"), ("R2", "4")),
    ]
    assert numbers(rows[0]["each seed %"], 100) == [0.9, 0.8]
    assert numbers(rows[0]["mean %"], 100)[0] == pytest.approx(0.85)
    assert numbers(rows[1]["points vs exact"], 100)[0] == pytest.approx(-0.01)
    assert numbers(page.rows("step")[0]["forward ms"]) == [4.25]  # the median of 3.25 and 5.25
    assert page.rows("training-memory")[1]["convolutions MB"][1] == [750]


def test_runs_of_other_machines_or_protocols_stay_apart() -> None:
    other = training(1, 0.5)
    for run in other["runs"]:
        run["machine"] = {"cpu": "Another CPU"}
    longer = training(3, 0.6)
    for run in longer["runs"]:
        run["config"]["epochs"] = 99
    files = [save("a.json", training()), save("b.json", other), save("c.json", longer)]
    page = page_of(*files)
    assert {name for name in page.tables if name.startswith("score")} == {"score", "score-2", "score-3"}
    assert [numbers(page.rows(name)[0]["each seed %"], 100) for name in ("score", "score-2", "score-3")] == [
        [0.9], [0.5], [0.6],
    ]  # fmt: skip
    assert "Another CPU" in page.text


def test_page_equals_tuning() -> None:
    page = page_of(save("tune.json", tuning()))
    row, none = page.rows("tuning")
    assert (row["trials"][1], row["failed"][1]) == ([5], [1])
    assert numbers(row["default ms"], 1e3) == [0.0062]
    assert numbers(row["winner ms"], 1e3) == [0.0031]
    assert numbers(row["better at trial"]) == [2, 4]
    assert numbers(row["with ms"], 1e3) == [0.004, 0.0032]
    assert none["winner ms"][0] == "–"
    (axes,) = parts_of("tune.json")["tuning"].figure.axes
    (line,) = axes.lines
    assert [list(line.get_xdata()), list(line.get_ydata())] == [[2, 4, 5], pytest.approx([0.8, 1, 1])]


def test_tuning_logs() -> None:
    files = sorted((ROOT / "tuning_logs").glob("*/*_ci64_co64_56x56_*_r2x2_float32_nchw.jsonl"))
    assert len({path.parent.name for path in files}) == 2
    page = page_of(*files)
    assert set(page.tables) == {"tuning", "tuning-2"}  # one per device
    for part, device in (("tuning", files[0].parent.name), ("tuning-2", files[-1].parent.name)):
        own = [path for path in files if path.parent.name == device]
        for row, path in zip(page.rows(part), own, strict=True):
            lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
            seconds = [line["seconds"] for line in lines if line["kind"] == "trial" and "seconds" in line]
            assert row["trials"][1] == [sum(line["kind"] == "trial" for line in lines)]
            assert row["with ms"][1][-1] == min(seconds)


def test_emulated_is_said() -> None:
    document = tuning()
    document["made"]["emulated"] = True
    (section,) = sections_of(read_all([save("tune.json", document)]))
    assert section.exhibits[0].basis == "emulated"
    assert "say nothing about a board" in section.paragraphs[0]
    document = comparison()
    document["machine"] = {"cpu": "Host CPU", "gpu": {"name": "Some GPU", "emulated": True}}
    (section,) = sections_of(read_all([save("compare.json", document)]))
    assert section.exhibits[0].basis.startswith("emulated")
    assert "Some GPU" in section.title


def test_several_comparisons_and_doubt() -> None:
    busy = comparison()
    busy["conditions"]["other_cores"] = 1.26
    page = page_of(save("a.json", comparison()), save("b.json", busy))
    assert set(page.tables) == {f"{name}{end}" for name in ("speedup", "memory", "roofline") for end in ("", "-2")}
    assert page.text.count("Doubtful: other programs kept 1.3 cores busy") == 1
    assert "Training" not in page.text


def test_texts_are_escaped_and_no_formulas() -> None:
    hostile = "<script>alert('x')</script> & $\\frac{$ \"quoted\""
    documents = {name: make() for name, make in MAKERS.items()}
    documents["compare.json"]["rows"][0]["name"] = hostile
    documents["compare.json"]["machine"] = {"cpu": hostile}
    documents["evaluate.json"]["model"] = documents["evaluate.json"]["layers"][0]["name"] = hostile
    documents["evaluate.json"]["recommendation"]["why"] = hostile
    documents["train.json"]["runs"][0]["config"]["data"] = hostile
    documents["tune.json"]["tasks"][0]["workload"] = hostile
    files = [save(name, document) for name, document in documents.items()]
    page = Page(write_report(files, "out", hostile).read_text())
    assert "script" not in page.tags
    assert page.text.count(hostile) >= 7


def changed(make: Callable[[], dict[str, Any]], change: Callable[[dict[str, Any]], object]) -> str:
    document = make()
    change(document)
    return json.dumps(document)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("\ufeff{}", "not JSON"),
        ('{"schema_version": NaN}', "NaN is not a number in JSON"),
        ("[1]", "must be an object with schema_version 1 (compare)"),
        ("{}", "has no schema"),
        ('{"schema": "gf_tvm.train/2"}', "schema is 'gf_tvm.train/2'; this version reads"),
        ('{"schema_version": 2}', "schema_version is 2; this version reads"),
        (changed(comparison, lambda d: d.update(rows=[])), "'rows' is empty: there is nothing to report"),
        (changed(comparison, lambda d: d["rows"][2].pop("gf_tvm_ms")), "row 3 (8x9x9): 'gf_tvm_ms' is missing"),
        (changed(comparison, lambda d: d["rows"][0].update(baseline_ms="1")), "must be a number above 0, got '1'"),
        (changed(comparison, lambda d: d["rows"][0].update(gf_tvm_kernel_ms=0)), "'gf_tvm_kernel_ms' must be a number"),
        (changed(comparison, lambda d: d["rows"][0].update(dtype="nn")), "'dtype' must be one of float32"),
        (changed(comparison, lambda d: d["rows"][1].update(groups=3)), "row 2 (8x16x16): no convolution: "),
        (changed(comparison, lambda d: d.pop("threads")), "'threads' is missing"),
        (changed(training, lambda d: d.update(runs=[])), "'runs' is empty"),
        (changed(training, lambda d: d["runs"][1].update(rows=[])), "run 2 (R2): 'rows' is empty"),
        (changed(training, lambda d: d["runs"][0]["step_ms"].pop("update")), "step_ms: 'update' is missing"),
        (changed(evaluation, lambda d: d.update(settings=[])), "'settings' is empty"),
        (changed(evaluation, lambda d: d.update(conditions="batch 32")), "'conditions' must be an object of texts"),
        (changed(evaluation, lambda d: d["obstacles"].pop("cache")), "obstacles: 'cache' is missing"),
        (changed(evaluation, lambda d: d["settings"][1].pop("scores")), "setting 2 (R4): 'scores' is missing"),
        (changed(evaluation, lambda d: d["settings"][0]["scores"].append(0.5)), "one number per seed, 2, got 3"),
        (changed(evaluation, lambda d: d["settings"][0].update(scores=[90, 91])), "a number from 0 to 1"),
        (changed(evaluation, lambda d: d["settings"].append(d["settings"][0])), "exact, last 1 is there twice"),
        (
            changed(evaluation, lambda d: d["layers"][1].pop("cosine_weight")),
            "layer 2 (conv2): 'cosine_weight'",
        ),
        (changed(tuning, lambda d: d.update(tasks=[])), "'tasks' is empty"),
        (changed(tuning, lambda d: d["tasks"][0].pop("trial_seconds")), "'trial_seconds' is missing"),
        (changed(tuning, lambda d: d["tasks"][0].update(trial_seconds=[])), "no kernel has a trial"),
    ],
)
def test_bad_files(text: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.json").write_text(text)
    fails(capsys, f"bad.json: {said}" if "'rows' is empty: " in said else said, "bad.json", "--out", "out")


def fails(capsys: pytest.CaptureFixture[str], said: str, *arguments: str) -> None:
    before = sorted(Path().rglob("*"))
    assert main(["report", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert said in err
    assert sorted(Path().rglob("*")) == before  # nothing half-written


def test_other_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    good, same = save("good.json", training()), save("same.json", training())
    Path("events.jsonl").write_text('{"time": 1, "kind": "start"}\n')
    Path("file").write_text("")
    Path("taken/index.html").mkdir(parents=True)
    fails(capsys, "FILE", "--out", "out")
    fails(capsys, "--out", good)
    fails(capsys, "missing.json: cannot read: No such file", "missing.json", "--out", "out")
    fails(capsys, "good.json: given twice", good, "./good.json", "--out", "out")
    fails(capsys, "same.json and good.json cannot go together: both have", good, same, "--out", "out")
    fails(capsys, "events.jsonl: not a tuning log", "events.jsonl", "--out", "out")
    fails(capsys, "cannot write the folder 'file': it is a file", good, "--out", "file")
    fails(capsys, "cannot write the folder 'taken'", good, "--out", "taken")
    with pytest.raises(ReportError, match="nothing to report"):
        write_report([], "out")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from importlib import util

    good, find = save("good.json", training()), util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "jinja2" else find(name))
    fails(capsys, "a report needs jinja2: pip install 'gf-tvm[plot]'", good, "--out", "out")


@pytest.mark.usefixtures("one_thread")
def test_what_the_commands_write_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real comparison and a real training run, tiny and without kernels."""
    known_limits.install(monkeypatch)
    from training_models import patterns

    from gf_tvm.comparison.run import compare
    from gf_tvm.core.geometry import Geometry
    from gf_tvm.shapes import Case

    case = Case("small", Geometry(2, 8, 8, 8, 8, (3, 3), (2, 2), padding=(1, 1)))
    document = compare([case], None, seconds=0, threads=1).to_dict()
    save("compare.json", document)
    command = ["train", "--protocol", "paper", "--model", "training_models:tiny", "--last", "1"]
    command += ["--data", patterns(tmp_path / "patterns.npz")]
    command += ["--image-size", "8", "--batch", "8", "--epochs", "1", "--pretrain-epochs", "1", "--patch", "exact,2"]
    assert main([*command, "--threads", "1", "--json", "train.json"]) == 0
    page = page_of("compare.json", "train.json")
    written = json.loads(Path("compare.json").read_text())["rows"][0]
    assert page.rows("speedup")[0]["gf_tvm ms"][1] == [written["gf_tvm_ms"]]
    runs = json.loads(Path("train.json").read_text())["runs"]
    assert [row["each seed %"][1] for row in page.rows("score")] == [[run["test_accuracy"]] for run in runs]
    assert all(math.isfinite(row["step ms"][1][0]) for row in page.rows("step"))


def test_reading_results_needs_no_drawing() -> None:
    save("train.json", training())
    code = (
        "import sys; from gf_tvm.report.sources import read; read('train.json'); "
        "print(*sorted({'matplotlib', 'jinja2', 'tvm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
    assert read("train.json").kind == "train"
