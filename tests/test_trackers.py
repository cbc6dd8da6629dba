"""What TensorBoard and wandb hold after an export is read back with the tools' own formats."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from npo_core.artifacts import RunArtifacts
from npo_core.interfaces import ConfigurationError
from npo_core.trackers import TensorBoardTracker, WandbTracker, export, open_trackers, track
from npo_core.views import steps
from schemas.config import RunSection
from tests.synthetic import build_run

SEGMENTS = 6
"""main [0, 2), scout [2, 6), replay [2, 6), main [6, 8), in segments of two steps."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunArtifacts:
    return build_run(tmp_path_factory.mktemp("store"), steps=8, segment_steps=2)


def scalars(folder: Path) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """(leg folder, tag) → points, from TensorBoard's event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for leg in sorted(folder.iterdir()):
        events = EventAccumulator(str(leg)).Reload()
        for tag in events.Tags()["scalars"]:
            found[leg.name, tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    return found


def wandb_history(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of the history in wandb's offline files: LevelDB's log format behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    for path in sorted(folder.rglob("*.wandb")):
        data, at, whole = path.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if (left := 32768 - at % 32768) < 7:
                at += left
                continue
            _, size, part = struct.unpack_from("<IHB", data, at)
            whole += data[at + 7 : at + 7 + size]
            at += 7 + size
            if part in (1, 4):  # a whole record, or its last part
                record = Record()
                record.ParseFromString(whole)
                whole = b""
                if record.WhichOneof("record_type") == "history":
                    yield {(i.key or ".".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}


def test_tensorboard_holds_every_step_of_every_leg_under_the_metrics_own_names(
    run: RunArtifacts, tmp_path: Path
) -> None:
    assert track(RunSection(name="x", trackers=("tensorboard",), tracker_dir=str(tmp_path)), run) == SEGMENTS
    found = scalars(tmp_path / "tensorboard" / run.run_id)
    for (leg_id, kind), part in steps(run).group_by(["leg_id", "kind"]):
        points = found[f"{kind}-{leg_id}", "reward"]
        assert [step for step, _ in points] == sorted(part["step"])
        assert dict(points) == pytest.approx(dict(part.select("step", "reward").iter_rows()), abs=1e-6)
    assert {tag for _, tag in found} >= {"entropy", "npo/replaced", "tokens/policy", "grad_norm"}


def test_a_resumed_run_exports_what_a_killed_one_did_not(run: RunArtifacts, tmp_path: Path) -> None:
    class KilledAtThird(TensorBoardTracker):
        taken = 0

        def log_segment(self, *segment: Any) -> None:
            KilledAtThird.taken += 1
            if KilledAtThird.taken == 3:
                raise KeyboardInterrupt
            super().log_segment(*segment)

    with pytest.raises(KeyboardInterrupt):
        export(run, KilledAtThird(tmp_path / "events"), tmp_path / "markers")
    assert export(run, TensorBoardTracker(tmp_path / "events"), tmp_path / "markers") == SEGMENTS
    found = scalars(tmp_path / "events" / run.run_id)
    logged = {leg: {step for step, _ in points} for (leg, tag), points in found.items() if tag == "reward"}
    wanted = {f"{kind}-{leg_id}": set(part["step"]) for (leg_id, kind), part in steps(run).group_by(["leg_id", "kind"])}
    assert logged == wanted
    assert export(run, TensorBoardTracker(tmp_path / "events"), tmp_path / "markers") == 0


@pytest.mark.slow
def test_wandb_offline_holds_the_same_rows_once_over_two_processes_worth_of_exports(
    run: RunArtifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    markers = tmp_path / "markers"
    assert export(run, WandbTracker(tmp_path), markers) == SEGMENTS
    last = max((markers / run.run_id).iterdir())
    last.unlink()
    assert export(run, WandbTracker(tmp_path), markers) == 1
    history = list(wandb_history(tmp_path))
    table = steps(run)
    again = [row for row in table.iter_rows(named=True) if last.name.startswith(row["leg_id"])]
    assert len(history) == table.height + 2
    assert len(again) >= 2
    for row in table.iter_rows(named=True):
        name = "scout/reward" if row["kind"] == "scout" else "reward"
        logged = [h for h in history if h["leg"] == row["leg_id"] and h["step"] == row["step"]]
        assert {h[name] for h in logged} == {row["reward"]}
    # wandb's own step: the clock of trained steps, so that a row exported twice falls on itself.
    assert {int(h["_step"]) for h in history} == set(range(table.height))


@pytest.mark.parametrize(("name", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_missing_package_is_named_with_its_extra(
    name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigurationError, match=rf"{name}.*near-future\[trackers\]"):
        open_trackers([name], tmp_path)
