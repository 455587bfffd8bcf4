"""Small files of results, as the commands write them, and a reader of the page's tables."""

from __future__ import annotations

from dataclasses import fields
from html.parser import HTMLParser
from typing import Any

from gf_tvm.training.config import TrainConfig
from gf_tvm.tuning import Summary, TaskSummary

HEAD: dict[str, Any] = {
    "machine": {"cpu": "Some CPU", "cores": 2, "system": "Linux 6"},
    "threads": 2,
    "versions": {"python": "3.11", "torch": "2.13.0", "onednn": None},
}


def comparison() -> dict[str, Any]:
    """Two convolutions with two patches each."""
    return {
        "schema_version": 1,
        **HEAD,
        "peak_gflops": 150.0,
        "bandwidth_gbs": 20.0,
        "conditions": {"date": "2026-01-01", "other_cores": 0.0},
        "rows": [_row(name, size, patch) for name, size in (("8x16x16", 16), ("8x9x9", 9)) for patch in (2, 4)],
    }


def chains() -> dict[str, Any]:
    """A comparison of a chain with two patches, and of no single convolution."""
    document = {**comparison(), "rows": [], "geometric_means": [], "chains": [_chain(patch) for patch in (2, 4)]}
    document["conditions"] = {**document["conditions"], "chains": "the operations of one chain", "unchained": {}}
    return document


def _chain(patch: int) -> dict[str, Any]:
    return {
        "name": "layer1.conv1 to layer1.conv2",
        "device": "x86-64-v4",
        "dtype": "float32",
        "patch": [patch, patch],
        "convolutions": ["layer1.conv1", "layer1.conv2"],
        "schedule": "tuned",
        "filtered_schedule": "default",
        "forward_ms": {"exact": 70.5, "filtered": 72.25, "chained": 80.125},
        "backward_ms": {"exact": 132.5, "filtered": 40.25 / patch, "chained": 16.125 / patch},
        "kept_bytes": {"exact": 57_800_000, "filtered": 53_900_000, "chained": 57_800_000 // patch**2},
        "roofline_ms": 6.5 / patch,
        "max_rel_error": 4e-7,
    }


def _row(name: str, size: int, patch: int) -> dict[str, Any]:
    return {
        "name": name,
        "device": "x86-64-v4",
        "dtype": "float32",
        "n": 2,
        "ci": 8,
        "co": 8,
        "h": size,
        "w": size,
        "kernel": [3, 3],
        "stride": [1, 1],
        "padding": [1, 1],
        "dilation": [1, 1],
        "groups": 1,
        "patch": [patch, patch],
        "baseline": "onednn",
        "baseline_ms": 1.2345 * size,
        "reference_ms": 0.4321 * size,
        "gf_tvm_ms": 0.1234 * size / patch,
        "gf_tvm_kernel_ms": None,
        "schedule": "tuned",
        "roofline_ms": 0.0345 * size / patch,
        "roofline": "bandwidth",
        "max_rel_error": 3e-7,
        "saved_bytes_baseline": 64 * size * size,
        "saved_bytes_gf_tvm": 64 * size * size // patch**2 + 7,
    }


def training(seed: int = 0, score: float = 0.9, last: int = 2) -> dict[str, Any]:
    """An exact and a filtered run."""
    runs = []
    for index, patch in enumerate((None, [2, 2])):
        config = {**TrainConfig(model="resnet18_025", seed=seed, last=last).to_dict(), "patch": patch}
        assert set(config) == {field.name for field in fields(TrainConfig)}
        kept = {"kept_bytes": 5000 - index, "kept_bytes_convolutions": 3000 // (1 + 3 * index)}
        run = {
            "schema": "gf_tvm.train/1",
            "variant": "R2" if patch else "exact",
            "config": config,
            **HEAD,
            "test_accuracy": score - 0.01 * index,
            "initial_test_accuracy": 0.31,
            "library": None,
            "step_ms": {"forward": 3.25 + seed, "backward": 2.5 / (1 + index), "update": 0.125},
            "rows": [{"epoch": 1, "kept_bytes": 1, "kept_bytes_convolutions": 1}, {"epoch": 2, **kept}],
        }
        runs.append(run)
    return {"schema": "gf_tvm.train/1", "runs": runs}


def evaluation() -> dict[str, Any]:
    """Two backward passes, one and two layers, two seeds."""
    settings = [
        {
            "variant": variant,
            "last": last,
            "seeds": [0, 1],
            "scores": [0.9 + 0.01 * last, 0.95 - 0.001 * index],
            "initial_scores": [0.3, 0.31],
            "kept_bytes": 9000 + last,
            "kept_bytes_convolutions": 800 * last,
            "step_ms": {"forward": 4.5, "backward": 1.5 * last / (index + 1), "update": 0.25},
            "peak_bytes": 300_000_000 if index else None,
            "backward_flops": 10**7 * last,
            "forward_flops": 10**8,
            "energy_joules_per_step": None,
        }
        for last in (1, 2)
        for index, variant in enumerate(("exact", "R4"))
    ]
    layers = [
        {"name": "conv1", "variant": "R4", "cosine_weight": 0.8765, "cosine_input": None},
        {"name": "conv2", "variant": "R4", "cosine_weight": 0.7654, "cosine_input": 0.4321},
    ]
    return {
        "schema": "gf_tvm.evaluate/1",
        **HEAD,
        "conditions": {"data": "batch 32", "scores": "on 40 images", "step times": "medians", "cosines": "4 batches"},
        "model": "mobilenetv2",
        "data": "digits",
        "task": "classification",
        "metric": "accuracy",
        "settings": settings,
        "layers": layers,
        "limits": {"memory_budget": 64_000_000, "max_score_drop": 0.01},
        "obstacles": {"limits": None, "filtering": {}, "cache": None},
        "recommendation": {"variant": "R4", "last": 2, "why": "It keeps the least."},
    }


def tuning() -> dict[str, Any]:
    """Two kernels, one of which has no trial."""
    key = "backward_n2_ci8_co8_9x9_k3x3_s1x1_p1x1_d1x1_g1_r2x2_float32_nchw"
    made = {"gf_tvm": "0.1.0", "tvm": "0.27", "cpu": "Some CPU", "threads": 2, "measurement": {"repeats": 5}}
    trials = (None, 0.004, 0.005, 0.0032, 0.0033)
    common: dict[str, Any] = {"stopped": "trials", "space": "ours", "config": {}, "confirmed": True}
    tasks = (
        TaskSummary(key, "a.jsonl", 5, 5, 1, seconds=0.0031, default_seconds=0.0062, trial_seconds=trials, **common),
        TaskSummary("filter_input_n1", "b", 0, 0, 0, seconds=None, default_seconds=None, trial_seconds=(), **common),
    )
    document = Summary("x86-64-v4", "logs", 60.0, made, tasks).to_dict()
    document["tasks"] = [{**task, "trial_seconds": list(task["trial_seconds"])} for task in document["tasks"]]
    return document


class Page(HTMLParser):
    """What a page shows: ``tables[part][row][column]`` as (text, numbers), headers, addresses and running text;
    ``stated`` are the lists of conditions by id (under a figure: by part), ``described[part]`` the ids of those that a
    figure refers to."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[tuple[str, list[float]]]]] = {}
        self.headers: dict[str, list[str]] = {}
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.stated: dict[str, list[tuple[str, str]]] = {}
        self.described: dict[str, list[str]] = {}
        self._part = ""
        self._list: list[tuple[str, str]] = []
        self._term: str | None = None
        self._cell: list[Any] | None = None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.tags.append(tag)
        self.addresses += [str(values[name]) for name in ("src", "href") if name in values]
        if tag == "article":
            self._part = str(values["id"])
            self.tables[self._part], self.headers[self._part] = [], []
        elif tag == "figure":
            self.described[self._part] = (values.get("aria-describedby") or "").split()
        elif tag == "dl":
            self._list = self.stated[values.get("id") or self._part] = []
        elif tag in ("dt", "dd"):
            self._term = ""
        elif tag == "tr":
            self.tables[self._part].append([])
        elif tag in ("td", "th"):
            self._cell = ["", []]
        elif tag == "data":
            assert self._cell is not None
            self._cell[1].append(float(str(values["value"])))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cell is not None:
            if tag == "td":
                self.tables[self._part][-1].append((self._cell[0], self._cell[1]))
            else:
                self.headers[self._part].append(self._cell[0])
            self._cell = None
        elif tag == "dt" and self._term is not None:
            self._list.append((self._term, ""))
            self._term = None
        elif tag == "dd" and self._term is not None:
            self._list[-1] = (self._list[-1][0], self._term)
            self._term = None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._term is not None:
            self._term += data
        if self._cell is not None:
            self._cell[0] += data

    def conditions(self, part: str) -> list[tuple[str, str]]:
        """All conditions of a figure: those that it refers to, and those under it."""
        return [pair for name in (*self.described[part], part) for pair in self.stated.get(name, [])]

    def rows(self, part: str) -> list[dict[str, tuple[str, list[float]]]]:
        """A table's rows by header."""
        table = [row for row in self.tables[part] if row]
        return [dict(zip(self.headers[part], row, strict=True)) for row in table]
