"""Proposes which candidates to measure next."""

from __future__ import annotations

import itertools
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .cost_model import CostModel
from .log import Record, config_id, fits_space
from .measuring.process import describe
from .measuring.result import Result
from .metaschedule import metaschedule, tune_context
from .task import Candidate, Config, SearchSpace, Task, TuningError
from .traces import check_trace

#: Trials before the cost model is asked.
WARM_UP = 8
#: Part of each batch that is drawn at random, whatever the model says.
EPSILON = 0.1
# Candidates that are ranked for each one that is chosen.
_CHOICE = 16
# The fastest trials, whose configurations are varied.
_PARENTS = 8
# Trials of earlier runs that MetaSchedule's search learns from; each has to be scheduled anew.
_REPLAYED = 256
# Larger spaces are not enumerated to find out whether anything is left.
_ENUMERABLE = 1 << 15
_DRAWS = 400
# Trials before MetaSchedule's search asks its cost model.
_MS_WARM_UP = 16
# No limit on the trials of MetaSchedule's search, which the loop counts itself.
_MANY = 1 << 30
# Rounds without anything new after which MetaSchedule's space counts as exhausted.
_EMPTY_ROUNDS = 5


class Search(ABC):
    """Proposes candidates, never one twice, and learns from what became of them."""

    #: Why the cost model is not in use, one line; empty if it is.
    complaint = ""

    def suggest(self, configs: Sequence[Config]) -> None:
        """Propose these before others; a search of another space than ours leaves them out."""
        return

    @abstractmethod
    def resume(self, records: Sequence[Record]) -> None:
        """Learn from the trials of earlier runs. Raises ValueError for one that this search cannot have made."""

    @abstractmethod
    def propose(self, count: int) -> list[Candidate]:
        """Up to ``count`` new candidates; none if the space is exhausted."""

    @abstractmethod
    def learn(self, candidates: Sequence[Candidate], results: Sequence[Result]) -> None:
        """Learn from measured candidates."""


class ConfigSearch(Search):
    """Searches a space of ours: mutations and crossings of the fastest configurations, and random ones.

    Args:
        task: what to tune.
        seed: of all random choices.
        model: whether a cost model ranks candidates.
    """

    def __init__(self, task: Task, seed: int = 0, model: bool = True) -> None:
        self._space: SearchSpace = task.space
        self._rng = random.Random(seed)
        self._known: set[str] = set()
        self._times: list[tuple[float, Config]] = []
        self._trials = 0
        self._model = CostModel(seed) if model else None
        self._suggested: list[Config] = []
        self._unfitted: list[tuple[Candidate, Result]] = []

    def suggest(self, configs: Sequence[Config]) -> None:
        """Propose these before others; what is not in the space is left out."""
        self._suggested += [dict(config) for config in configs if fits_space(config, self._space)]

    def resume(self, records: Sequence[Record]) -> None:
        """Learn from the trials of earlier runs."""
        candidates, results = [], []
        for record in records:
            if record.config is None or not fits_space(record.config, self._space):
                raise ValueError(f"configuration {record.id} is not in the space")
            candidates.append(Candidate.of_record(record))
            results.append(Result(record.status, record.runs, record.excess, record.message))
        self.learn(candidates, results)

    def learn(self, candidates: Sequence[Candidate], results: Sequence[Result]) -> None:
        """Learn from measured candidates."""
        # The model is fitted when it is asked next: after the last batch it is not.
        self._unfitted += zip(candidates, results, strict=True)
        for candidate, result in zip(candidates, results, strict=True):
            self._known.add(candidate.id)
            self._trials += 1
            if result.seconds is not None and candidate.config is not None:
                self._times.append((result.seconds, candidate.config))
        self._times.sort(key=lambda item: item[0])

    def propose(self, count: int) -> list[Candidate]:
        """Up to ``count`` new candidates; the default configuration comes before all others."""
        chosen: dict[str, Candidate] = {}
        default = Candidate.of_config(self._space.default)
        if default.id not in self._known:
            chosen[default.id] = default
            self._known.add(default.id)
        while self._suggested and len(chosen) < count:
            self._add(chosen, self._suggested.pop(0))
            self._known.update(chosen)
        if len(chosen) >= count:
            return list(chosen.values())
        population = self._population(_CHOICE * max(count, 4))
        random_part = sum(self._rng.random() < EPSILON for _ in range(count))
        for candidate in itertools.chain(self._ranked(population)[: count - random_part], population):
            if len(chosen) >= count:
                break
            chosen[candidate.id] = candidate
        self._known.update(chosen)
        return list(chosen.values())

    # -------------------------------------------------------------------------------------------------- the population

    def _population(self, size: int) -> list[Candidate]:
        """New candidates in random order: half of them mutations, a quarter crossings, the rest random."""
        found: dict[str, Candidate] = {}
        parents = [config for _, config in self._times[:_PARENTS]]
        for draw in range(4 * size):
            if len(found) >= size:
                break
            kind = draw % 4 if parents else 3
            if kind < 2:
                config = self._mutate(self._rng.choice(parents))
            elif kind == 2:
                config = self._cross(self._rng.choice(parents), self._rng.choice(parents))
            else:
                config = self._space.sample(self._rng)
            self._add(found, config)
        draws = 0
        while not found and draws < _DRAWS:
            self._add(found, self._space.sample(self._rng))
            draws += 1
        if len(found) < size and math.prod(len(values) for values in self._space.knobs.values()) <= _ENUMERABLE:
            # A small space: what chance has not found is still there to be listed.
            for config in self._all():
                if len(found) >= size:
                    break
                self._add(found, config)
        population = list(found.values())
        self._rng.shuffle(population)
        return population

    def _add(self, found: dict[str, Candidate], config: Config) -> None:
        identity = config_id(config)
        if identity not in self._known and identity not in found and self._space.valid(config):
            found[identity] = Candidate("ours", identity, config=config)

    def _all(self) -> Iterator[Config]:
        knobs = self._space.knobs
        for values in itertools.product(*knobs.values()):
            yield dict(zip(knobs, values, strict=True))

    def _mutate(self, config: Config) -> Config:
        """Give one or two knobs another value; the next smaller or larger one half of the time."""
        free = [name for name, values in self._space.knobs.items() if len(values) > 1]
        changed = dict(config)
        for name in self._rng.sample(free, min(len(free), self._rng.choice((1, 1, 2)))):
            values = self._space.knobs[name]
            place = values.index(config[name])
            near = [i for i in (place - 1, place + 1) if 0 <= i < len(values)]
            far = [i for i in range(len(values)) if i != place]
            changed[name] = values[self._rng.choice(near if self._rng.random() < 0.5 else far)]
        return changed

    def _cross(self, a: Config, b: Config) -> Config:
        return {name: self._rng.choice((a, b))[name] for name in a}

    # -------------------------------------------------------------------------------------------------- the cost model

    def _ranked(self, population: list[Candidate]) -> list[Candidate]:
        """The population, the most promising first; as it is while the model knows too little."""
        if self._model is None or self._trials < WARM_UP or len(population) < 2:
            return population
        try:
            if self._unfitted:
                candidates, results = zip(*self._unfitted, strict=True)
                self._model.update(self._features(candidates), results)
                self._unfitted = []
            scores = self._model.predict(self._features(population))
        except TuningError:
            raise
        except Exception as error:
            self._give_up(error)
            return population
        order = sorted(range(len(population)), key=lambda i: -scores[i])
        return [population[i] for i in order]

    def _give_up(self, error: Exception) -> None:
        # Tuning without a ranking is slower, not wrong; the caller says so.
        self._model = None
        self.complaint = f"the cost model failed and is not used any more: {describe(error)}"

    def _features(self, candidates: Sequence[Candidate]) -> list[Sequence[float]]:
        return [self._space.features(candidate.config or {}) for candidate in candidates]


class MetaScheduleSearch(Search):
    """MetaSchedule's own design space and evolutionary search on the same definition, for comparison.

    Its populations and batches are in the proportion of its defaults (512 to 64).

    Args:
        task: what to tune.
        threads: of the search, and those that its rules expect the kernels to have.
        seed: of all random choices.
        batch: candidates of one round.
    """

    def __init__(self, task: Task, threads: int = 1, seed: int = 0, batch: int = 16) -> None:
        ms = metaschedule()
        import tvm

        self._task = task
        self._ms = ms
        target = task.target()
        if "num-cores" not in target.attrs:  # its rules for CPUs ask for it
            target = tvm.target.Target({**target.export(), "num-cores": threads})
        self._target = target
        module = task.module()
        self._arguments = ms.arg_info.ArgInfo.from_prim_func(module["main"])
        self._context = tune_context(
            module,
            target,
            space_generator="post-order-apply",
            search_strategy=ms.search_strategy.EvolutionarySearch(population_size=8 * batch, init_min_unmeasured=batch),
            num_threads=threads,
            rand_state=seed % ((1 << 31) - 1) + 1,
        )
        self._database = ms.database.MemoryDatabase()
        self._workload = self._database.commit_workload(module)
        config = ms.cost_model.xgb_model.XGBConfig(seed=seed % (1 << 31))
        self._model = ms.cost_model.XGBModel(
            config=config, num_warmup_samples=_MS_WARM_UP, num_tuning_cores=1, verbose_eval=0
        )
        self._context.pre_tuning(_MANY, batch, database=self._database, cost_model=self._model)
        self._known: set[str] = set()
        self._pending: dict[str, Any] = {}

    def resume(self, records: Sequence[Record]) -> None:
        """Learn from the trials of earlier runs."""
        self._known.update(record.id for record in records)
        candidates, results = [], []
        for record in (records[i] for i in _worth_replaying(records)):
            try:
                schedule = self._task.schedule(Candidate.of_record(record))
            except Exception as error:
                raise ValueError(f"trace {record.id} cannot be replayed: {type(error).__name__}") from None
            if self._hash(schedule) != record.id:
                raise ValueError(f"trace {record.id} gives another schedule")
            candidates.append(self._ms.MeasureCandidate(schedule, self._arguments))
            results.append(Result(record.status, record.runs, record.excess, record.message))
        self._feed(candidates, results)

    def propose(self, count: int) -> list[Candidate]:
        """Up to ``count`` new candidates. Raises TuningError if the rules make a trace that no log may have."""
        chosen: dict[str, Candidate] = {}
        for _ in range(_EMPTY_ROUNDS):
            proposed = self._context.generate_measure_candidates()
            if proposed is None:
                break
            for measured in proposed:
                identity = self._hash(measured.sch)
                if identity in self._known or len(chosen) == count:
                    continue
                self._known.add(identity)
                trace = _plain(measured.sch.trace.as_json())
                try:
                    check_trace(trace)
                except ValueError as error:
                    # Measured it would make a log that nobody reads.
                    raise TuningError(f"MetaSchedule made a schedule that a log may not have: {error}") from None
                self._pending[identity] = measured
                chosen[identity] = Candidate("metaschedule", identity, trace=trace)
            if chosen:
                break
        return list(chosen.values())

    def learn(self, candidates: Sequence[Candidate], results: Sequence[Result]) -> None:
        """Learn from measured candidates."""
        measured = [self._pending.pop(candidate.id) for candidate in candidates]
        outcomes = self._feed(measured, results)
        if measured:
            self._context.notify_runner_results(measured, outcomes)

    def _feed(self, measured: list[Any], results: Sequence[Result]) -> list[Any]:
        outcomes = [_runner_result(self._ms, result) for result in results]
        if measured:
            self._model.update(self._context, measured, outcomes)
        for candidate, result in zip(measured, results, strict=True):
            if result.status == "ok":
                self._database.commit_tuning_record(
                    self._ms.database.TuningRecord(
                        candidate.sch.trace, self._workload, list(result.runs), self._target, self._arguments
                    )
                )
        return outcomes

    def _hash(self, schedule: Any) -> str:
        return str(self._ms.utils.shash2hex(schedule.mod))


def _worth_replaying(trials: Sequence[Record] | Sequence[Result]) -> list[int]:
    """Which of many trials to learn from: the fastest say where to search, the latest what the search has come to."""
    half = _REPLAYED // 2
    order = sorted(range(len(trials)), key=lambda i: trials[i].seconds or math.inf)
    return sorted({*order[:half], *range(max(0, len(trials) - half), len(trials))})


def _runner_result(ms: Any, result: Result) -> Any:
    """MetaSchedule's form of a result."""
    if result.status == "ok":
        return ms.runner.RunnerResult(list(result.runs), None)
    return ms.runner.RunnerResult(None, result.status)


def _plain(value: Any) -> Any:
    """A trace's JSON form, which holds TVM's objects, as plain Python values."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    return _plain(value.value)  # IntImm, FloatImm
