"""What the test files share; and ``--fail-on-skip``: a test that did not run has shown nothing, so CI counts it as
failed.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from gf_tvm.errors import DeviceError
from gf_tvm.machine.profiles import DeviceProfile, get_profile

# Under emulation or load an example takes as long as it takes.
settings.register_profile("gf_tvm", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("gf_tvm")


def pytest_configure(config: pytest.Config) -> None:
    # As in a background job; the processes that tests start, and interrupt, would inherit it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Most tests run without a library on purpose; the tests of the warning itself ask for it.
    config.addinivalue_line("filterwarnings", "ignore::gf_tvm.FallbackWarning")


@pytest.fixture(autouse=True)
def _nothing_stays_compiled() -> Iterator[None]:
    """Dynamo keeps what it compiled, and the models that it was compiled for."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def no_kernels_on_demand() -> Iterator[None]:
    """Nothing is built in the background, in processes that tests start neither; tests of that ask for it."""
    # Not by the fixture monkeypatch: it would be undone after every other fixture, and bring back what they set.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GF_TVM_ON_DEMAND", "0")
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For many operators on tiny tensors, where waking a second thread takes longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def host() -> DeviceProfile:
    """This CPU's profile; of the session, so that it is asked for before any fixture that builds for it."""
    try:
        return get_profile("host")
    except DeviceError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def virtual_root() -> Path:
    """The root of a virtual Pi, in the user's cache; making it the first time takes a minute."""
    from gf_tvm.farm.virtual import missing_packages, prepare_root

    if missing := missing_packages():
        pytest.skip(f"virtual Pis need: apt-get install {' '.join(missing)}")
    return prepare_root()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fail-on-skip", action="store_true", help="report skipped tests and modules as failed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files go to the workers in this order, and none that takes minutes should be left over at the end.
    items.sort(key=lambda item: item.get_closest_marker("early") is None)


def _fail_if_skipped(config: pytest.Config, report: pytest.TestReport | pytest.CollectReport) -> None:
    # An expected failure is reported as skipped, too; it did run.
    if config.getoption("--fail-on-skip") and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{reason} (--fail-on-skip)"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    _fail_if_skipped(item.config, report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    report = yield
    _fail_if_skipped(collector.config, report)
    return report
