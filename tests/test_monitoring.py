"""A warning is seen three ways, one of them acts on it, and nothing intervenes twice."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.monitoring import watchdog
from npo_core import tip
from npo_core.artifacts import RunArtifacts, open_run
from npo_core.begin import begin
from npo_core.config_file import load_config
from npo_core.debris import kind_of
from npo_core.interfaces import ConfigurationError, NearFutureError
from npo_core.run_config import configure
from npo_core.verify import verify_run
from npo_core.workspace import Workspace
from schemas import layout
from schemas.config import Config
from schemas.decisions import DecisionCode
from tasks import legs, monitor, policies, workspaces
from tests.command import autonpo_arguments

ASKERS = ("flow", "event", "watchdog")


def configuration(store: Path, name: str, **overrides: object) -> Config:
    """Of `autonpo_arguments`."""
    _, config, *sets = autonpo_arguments(store, name, **overrides)
    return load_config(config, sets[1::2])


@pytest.fixture(scope="module")
def warned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, to be copied, whose main line stands at its first warning, which nobody has looked at."""
    store = tmp_path_factory.mktemp("warned")
    uri = workspaces.begin_run.fn(configuration(store, "demo", evaluation__every=0))
    leg = legs.open_leg.fn(uri, "main", policies.commit_warm_start.fn(uri))
    for start in range(0, 8, 2):
        legs.train_segment.fn(uri, leg, start, start + 2)
    return store / "demo"


@pytest.fixture
def run(warned: Path, tmp_path: Path) -> RunArtifacts:
    shutil.copytree(warned, tmp_path / "demo", ignore=shutil.ignore_patterns(layout.LEASES))
    return open_run(f"file://{tmp_path}/demo")


def switched(run: RunArtifacts, **autonpo: object) -> RunArtifacts:
    """The run, opened once with other settings of AutoNPO, as `npo run` does."""
    config = configure(run)
    run_section = config.run.model_copy(update={"store": run.uri.rpartition("/")[0]})
    begin(config.model_copy(update={"run": run_section, "autonpo": config.autonpo.model_copy(update=autonpo)}))
    return run


def test_a_warning_is_waited_for_until_it_is_decided_and_a_rollback_until_it_is_done(run: RunArtifacts) -> None:
    config = configure(run)
    warning = tip.waiting(run, config)
    assert warning is not None
    assert (warning.step, warning.code, run.decisions()) == (8, DecisionCode.WARNING, [])
    ended = config.model_copy(update={"run": config.run.model_copy(update={"total_steps": 8})})
    assert tip.waiting(run, ended) is None, "nobody decides at the end of a run"
    decided = monitor.confirm.fn(run.uri, warning)
    assert decided.intervene
    assert tip.waiting(run, config) == decided
    assert monitor.confirm.fn(run.uri, warning) == decided, "made once"
    assert run.decisions() == [decided]


def test_whatever_opens_a_run_by_its_uri_sees_how_it_was_last_opened(run: RunArtifacts) -> None:
    assert run.store.read_bytes(layout.CONFIG) is None, "the first configuration is in the record"
    for executes in ("watchdog", "event", "flow"):
        assert configure(switched(run, executes=executes)).autonpo.executes == executes
        assert Workspace.of(run).config.autonpo.executes == executes
    with pytest.raises(ConfigurationError, match="kappa was"):
        switched(run, kappa=7.0)
    assert configure(run).autonpo.kappa != 7.0, "what is refused is not kept"


def test_a_request_is_filed_once_an_asker_and_is_neither_fault_nor_debris(run: RunArtifacts) -> None:
    warning = tip.waiting(run, configure(run))
    assert warning is not None
    first = {by: monitor.file_request.fn(run.uri, warning, by) for by in ASKERS}
    again = {by: monitor.file_request.fn(run.uri, warning, by) for by in ASKERS}
    assert first == again
    filed = {request.by: (request.leg_id, request.step, request.reason) for request in run.requests()}
    assert filed == dict.fromkeys(ASKERS, (warning.leg_id, 8, warning.reason))
    for by in ASKERS:
        assert kind_of(layout.request(warning.leg_id, 8, by)) == "record"
    assert tip.waiting(run, configure(run)) is not None, "a request decides nothing"
    opened = Workspace.of(switched(run, executes="event"))
    assert verify_run(run, opened.verifier, opened.decode) == []
    (Path(run.uri.removeprefix("file://")) / layout.request("0" * 12, 8, "flow")).write_text(
        first["flow"].model_copy(update={"leg_id": "0" * 12}).model_dump_json()
    )
    assert [fault.key for fault in verify_run(run, opened.verifier, opened.decode)] == [
        layout.request("0" * 12, 8, "flow")
    ]


@pytest.fixture
def api(prefect_server: dict[str, str]) -> Iterator[None]:
    """Flows of this process speak to the tests' server."""
    from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_TO_API_ENABLED, temporary_settings

    server = {PREFECT_API_URL: prefect_server["PREFECT_API_URL"], PREFECT_LOGGING_TO_API_ENABLED: False}
    with temporary_settings(server):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("api")
def test_the_watchdog_asks_while_another_executes_and_decides_nothing(run: RunArtifacts) -> None:
    for executes in ("flow", "event"):
        ticks = [watchdog.fn(switched(run, executes=executes).uri) for _ in range(3)]
        assert [(tick.outcome, tick.step) for tick in ticks] == [("requested", 8)] * 3
        assert executes in ticks[0].reason
    assert [request.by for request in run.requests()] == ["watchdog"]
    assert run.decisions() == []
    assert run.store.list(layout.LEASES) == [], "it is no writer that others are warned of"


@pytest.mark.slow
@pytest.mark.usefixtures("api")
def test_the_watchdog_says_when_there_is_nothing_for_it(run: RunArtifacts, eight_steps: Path) -> None:
    with pytest.raises(ConfigurationError, match="a run of npo: only autonpo warns"):
        watchdog.fn(f"file://{eight_steps}/synthetic")
    with pytest.raises(NearFutureError, match="there is no run 'gone'"):
        watchdog.fn(run.uri.replace("demo", "gone"))
    assert watchdog.fn(switched(run, executes="flow").uri).outcome == "requested"
    config = configure(run)
    store = run.uri.rpartition("/")[0]
    begin(config.model_copy(update={"run": config.run.model_copy(update={"total_steps": 8, "store": store})}))
    tick = watchdog.fn(run.uri)
    assert (tick.outcome, tick.reason) == ("ended", "all 8 steps are trained")
