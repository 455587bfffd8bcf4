"""A space: named choices, a rule for which combinations make sense, and the schedule that a combination stands for."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from gf_tvm.errors import BuildError

#: One point of a space: a value for every knob.
Config = dict[str, int]


@dataclass(frozen=True)
class Space:
    """The choices for one workload on one device.

    Choosing is kept apart from generating code: a config is a small dictionary of numbers that a log can keep and a
    person can read, and :meth:`schedule` is the only way from there to a kernel.

    Attributes:
        knobs: name -> values to choose from; empty for a kernel without choices.
        default: runs well untuned; always a valid point.
        build: config -> finished ``tvm.s_tir.Schedule``, or an IRModule that needs no schedule.
        rule: config -> whether the combination makes sense (registers, divisibility).
        describe: config -> further numbers, as many for each point, that say more about its speed than the knobs do
            one by one (products, waste, bytes); for the cost model. None if there are none.
    """

    knobs: Mapping[str, tuple[int, ...]]
    default: Config
    build: Callable[[Config], Any]
    rule: Callable[[Config], bool] = lambda config: True
    describe: Callable[[Config], Sequence[float]] | None = None

    def valid(self, config: Mapping[str, int]) -> bool:
        """Whether ``config`` is a point of this space."""
        return (
            set(config) == set(self.knobs)
            and all(config[name] in values for name, values in self.knobs.items())
            and self.rule(dict(config))
        )

    def schedule(self, config: Mapping[str, int]) -> Any:
        """What to compile: a schedule or an IRModule. Raises BuildError if ``config`` is no point of this space."""
        if not self.valid(config):
            raise BuildError(
                f"{dict(config)} is no point of this space; knobs: { {k: list(v) for k, v in self.knobs.items()} }"
            )
        return self.build(dict(config))

    def module(self, config: Mapping[str, int]) -> Any:
        """The same as an IRModule."""
        built = self.schedule(config)
        return getattr(built, "mod", built)

    def features(self, config: Mapping[str, int]) -> list[float]:
        """What a cost model sees of a point: log2 of every value (-1 for 0), then what ``describe`` adds."""
        values = [math.log2(config[name]) if config[name] else -1.0 for name in self.knobs]
        return values + [float(value) for value in (self.describe(dict(config)) if self.describe else ())]

    @cached_property
    def size(self) -> int:
        """Number of valid points (counted, so not for enormous spaces)."""
        return sum(1 for _ in self.points())

    def points(self) -> Any:
        """All valid points, in a fixed order."""
        for values in itertools.product(*self.knobs.values()):
            config = dict(zip(self.knobs, values, strict=True))
            if self.rule(config):
                yield config

    def sample(self, rng: random.Random) -> Config:
        """A random valid point."""
        for _ in range(1000):
            config = {name: rng.choice(values) for name, values in self.knobs.items()}
            if self.rule(config):
                return config
        return dict(self.default)
