"""The long counts over S3: what a killed process had asked for may still happen, and the run ends bit-identical."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.s3_server import S3Server
from tests.test_soak import endure_random_kills, undisturbed

pytestmark = pytest.mark.soak

KILLS = 50


def test_random_kills_over_s3_change_nothing(
    tmp_path: Path, prefect_server: dict[str, str], s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = undisturbed(tmp_path, prefect_server)
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    endure_random_kills("s3://runs/soak", expected, prefect_server, KILLS)
