"""The cost model, on a space whose times are computed: what it sees, what it learns, and what the search owes to it."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from toy_task import TaskOf, ToyTask

from gf_tvm.errors import BuildError
from gf_tvm.schedules.space import Config, Space
from gf_tvm.tuning import task as tuning_task
from gf_tvm.tuning.cost_model import CostModel
from gf_tvm.tuning.loop import _record
from gf_tvm.tuning.measuring.result import Result
from gf_tvm.tuning.search import ConfigSearch
from gf_tvm.tuning.task import Candidate, TuningError

SIZES = (1, 2, 4, 8, 16, 32)
KNOBS: dict[str, tuple[int, ...]] = {"m": SIZES, "c": SIZES, "o": SIZES, "v": SIZES, "rows": SIZES, "near": (0, 1, 4)}


def build(_: Config) -> Any:
    raise BuildError("a space without kernels")


def rule(config: Config) -> bool:
    return config["m"] * config["c"] <= 64 and config["o"] * config["v"] <= 64


def milliseconds(config: Config) -> float:
    """Like a kernel of two products: register tiles that suit, blocks that fit into a cache, a little prefetching."""
    tiles = abs(math.log2(config["m"] * config["c"] / 64)) + abs(math.log2(config["o"] * config["v"] / 32))
    shapes = abs(math.log2(config["m"] / 16)) / 2 + abs(math.log2(config["v"] / 8)) / 2
    cache = abs(math.log2(config["rows"] * config["m"] / 128))
    return 1.0 + 0.3 * tiles + 0.2 * shapes + 0.2 * cache + 0.1 * (config["near"] != 1)


SPACE = Space(KNOBS, dict.fromkeys(KNOBS, 1), build, rule)


def best_of_search(space: Space, seed: int, trials: int = 64, batch: int = 8) -> float:
    """Milliseconds of the fastest point that the search finds; every measurement is off by some percent."""
    search, noise = ConfigSearch(TaskOf(space), seed), random.Random(seed)
    times: list[float] = []
    while len(times) < trials:
        candidates = search.propose(batch)
        found = [milliseconds(candidate.config or {}) for candidate in candidates]
        search.learn(candidates, [Result("ok", (1e-3 * ms * noise.gauss(1, 0.02),)) for ms in found])
        times += found
    assert search.complaint == ""
    return min(times)


def best_of_draws(space: Space, seed: int, trials: int = 64) -> float:
    rng = random.Random(seed)
    return min(milliseconds(space.sample(rng)) for _ in range(trials))


def excess(best: Callable[[Space, int], float], space: Space) -> float:
    """By what part of the time of the best point the found ones are slower, in the mean over some seeds."""
    least = min(milliseconds(config) for config in space.points())
    return statistics.mean(best(space, seed) for seed in range(8)) / least - 1


def test_the_search_finds_more_than_draws_do_and_owes_it_to_the_features() -> None:
    drawn, guided = excess(best_of_draws, SPACE), excess(best_of_search, SPACE)
    # A model that cannot tell points apart leaves the search what it is without one.
    blind = type("Blind", (Space,), {"features": lambda self, config: [1.0]})(KNOBS, SPACE.default, build, rule)
    assert guided < drawn / 2
    assert excess(best_of_search, blind) > drawn / 2


def test_features_of_a_point_are_its_knobs_and_what_the_space_adds() -> None:
    config = {"m": 8, "c": 1, "o": 2, "v": 32, "rows": 4, "near": 0}
    assert SPACE.features(config) == [3, 0, 1, 5, 2, -1]
    described = replace(SPACE, describe=lambda config: (config["m"] * config["c"],))
    assert described.features(config) == [3, 0, 1, 5, 2, -1, 8]
    assert Space({}, {}, build).features({}) == []


def rank_correlation(a: list[float], b: list[float]) -> float:
    ranks = (np.argsort(np.argsort(values)) for values in (a, b))
    return float(np.corrcoef(*ranks)[0, 1])


def test_the_model_learns_what_is_fast_and_what_fails() -> None:
    rng = random.Random(1)
    configs = [SPACE.sample(rng) for _ in range(160)]
    rows = [SPACE.features(config) for config in configs]
    results = [
        Result("crash") if config["near"] == 4 else Result("ok", (milliseconds(config) * 1e-3,)) for config in configs
    ]
    model = CostModel(seed=0)
    for batch in (slice(0, 48), slice(48, 96)):
        model.update(rows[batch], results[batch])
    scores = model.predict(rows[96:])
    ran = [i for i, result in enumerate(results[96:]) if result.status == "ok"]
    speeds = [-milliseconds(configs[96:][i]) for i in ran]
    assert rank_correlation([scores[i] for i in ran], speeds) > 0.6
    assert max(score for i, score in enumerate(scores) if i not in ran) < statistics.median(scores[i] for i in ran)


def test_a_resumed_search_knows_what_the_log_knows() -> None:
    search, records = ConfigSearch(TaskOf(SPACE), seed=1), []
    for _ in range(6):
        candidates = search.propose(8)
        results = [Result("ok", (milliseconds(candidate.config or {}),)) for candidate in candidates]
        search.learn(candidates, results)
        records += [_record("trial", c, r) for c, r in zip(candidates, results, strict=True)]
    resumed = ConfigSearch(TaskOf(SPACE), seed=2)
    resumed.resume(records)
    drawn = [Candidate.of_config(SPACE.sample(random.Random(n))) for n in range(64)]
    speeds = [-milliseconds(candidate.config or {}) for candidate in drawn]
    for each in (search, resumed):
        ranked = [candidate.id for candidate in each._ranked(drawn)]
        assert sorted(ranked) == sorted(candidate.id for candidate in drawn)
        assert rank_correlation([-float(ranked.index(candidate.id)) for candidate in drawn], speeds) > 0.4
        assert each.complaint == ""


def test_a_model_that_fails_is_given_up_with_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("broken")

    monkeypatch.setattr(CostModel, "update", fail)
    search = ConfigSearch(ToyTask(), seed=1)
    candidates = search.propose(8)
    search.learn(candidates, [Result("ok", (1.0,))] * 8)
    assert len(search.propose(4)) == 4
    assert search.complaint == "the cost model failed and is not used any more: ValueError: broken"


def test_without_xgboost_tuning_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(tuning_task, "import_module", missing)
    with pytest.raises(TuningError, match=r"tuning needs more packages: pip install 'gf-tvm\[tune\]' .*xgboost"):
        ConfigSearch(ToyTask())
    ConfigSearch(ToyTask(), model=False)
