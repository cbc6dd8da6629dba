"""Progress artifacts on a real Prefect server."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tasks import artifacts

pytestmark = pytest.mark.slow


@pytest.fixture
def client(prefect_server: dict[str, str]) -> Iterator[Any]:
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    url = prefect_server["PREFECT_API_URL"]
    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
        yield client


def shown(client: Any, run_id: str) -> list[tuple[float, str]]:
    """Percentage and description of a run's progress artifacts."""
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    wanted = ArtifactFilter(key=ArtifactFilterKey(any_=[f"progress-{run_id}"]))
    return [(made.data, made.description) for made in client.read_artifacts(artifact_filter=wanted)]


def work(run_id: str, seconds: float) -> None:
    """A stage of four steps, whose segment of two steps ends at the second."""
    from prefect import flow

    @flow(name="work")
    def stage() -> None:
        with artifacts.stage_progress(f"file:///runs/{run_id}", "main 0-4", 4) as bar:
            with artifacts.stage_progress(f"file:///runs/{run_id}", "main 0-2", 2) as part:
                part(1, {"reward": 0.25})
                time.sleep(seconds)
                artifacts.advance(1, {"reward": 0.25})
            bar(2, {})
            bar(4, {"accuracy": 0.5})

    stage()


def test_work_that_lasts_has_one_artifact_which_tells_of_its_end(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "SECONDS_BETWEEN_UPDATES", 0.2)
    work("long", seconds=0.3)
    assert shown(client, "long") == [(100.0, "long: main 0-4, 4 of 4, ended; accuracy 0.5")]


def test_short_work_has_none(client: Any) -> None:
    work("short", seconds=0)
    assert shown(client, "short") == []


def test_a_stage_goes_on_without_the_api(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}/api"
    monkeypatch.setattr(artifacts, "SECONDS_BETWEEN_UPDATES", 0.0)
    began = time.monotonic()
    with temporary_settings({PREFECT_API_URL: nowhere}):
        stage = artifacts.StageProgress("file:///runs/alone", "main 0-4", 4)
        stage(1, {})
        stage(2, {})
        stage.end()
    assert time.monotonic() - began < 10


def test_a_server_that_takes_a_call_and_never_answers_holds_a_stage_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    monkeypatch.setattr(artifacts, "SECONDS_BETWEEN_UPDATES", 0.0)
    monkeypatch.setattr(artifacts, "PATIENCE_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}/api"
        with temporary_settings({PREFECT_API_URL: url}):
            stage = artifacts.StageProgress("file:///runs/held-up", "main 0-4", 4)
            stage(1, {})
            began = time.monotonic()
            for done in range(2, 5):
                stage(done, {})
    assert time.monotonic() - began < 0.4, "only the first update may wait"
