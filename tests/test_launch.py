"""The commands that start a learner's ranks, and what is said about a hostfile that cannot be used."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest

from npo_core.begin import begin
from npo_core.interfaces import ConfigurationError
from npo_core.launch import launch_command
from schemas.config import Config
from schemas.deepspeed import DeepSpeedSection


def test_on_one_machine_torchrun_starts_the_ranks() -> None:
    assert launch_command(DeepSpeedSection(ranks=2), Path("/tmp/session")) == [
        *("/bin/sh", "-c", 'export NPO_LAUNCHER=$$; exec "$@"', "sh"),
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc_per_node=2", "--module", "npo_core.deepspeed_rank", "/tmp/session"),
    ]


def test_with_a_hostfile_deepspeeds_launcher_starts_those_of_every_host(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# the cluster\nnode-1 slots=8\n\nnode-2 slots=4  # the small one\n")
    section = DeepSpeedSection(ranks=4, hostfile=str(tmp_path / "hosts"))
    assert launch_command(section, Path("/shared/session")) == [
        *(sys.executable, "-m", "deepspeed.launcher.runner", f"--hostfile={tmp_path / 'hosts'}", "--num_gpus=4"),
        *("--master_addr=node-1", "--no_local_rank", "--module", "npo_core.deepspeed_rank", "/shared/session"),
    ]


def test_a_hostfile_below_home_is_handed_on_by_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "hosts").write_text("node-1 slots=1\n")
    command = launch_command(DeepSpeedSection(ranks=1, hostfile="~/hosts"), Path("/shared/session"))
    assert f"--hostfile={tmp_path / 'hosts'}" in command


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read: No such file"),
        ("# nobody\n", "names no host; write lines `HOST slots=N`"),
        ("node-1 8\n", "line 1: 'node-1 8' is not `HOST slots=N`"),
        ("node-1 slots=8\nnode-2 slots=2\n", "line 2: node-2 has slots=2, fewer than deepspeed.ranks 4"),
        ("node-1 slots=4\nnode-1 slots=4\n", "line 2: node-1 is named twice; give each host one line"),
    ],
)
def test_a_hostfile_that_cannot_be_used_is_refused(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "hosts").write_text(text)
    with pytest.raises(ConfigurationError, match=r"deepspeed\.hostfile") as raised:
        launch_command(DeepSpeedSection(ranks=4, hostfile=str(tmp_path / "hosts")), tmp_path)
    assert said in str(raised.value)


def test_without_deepspeed_no_run_begins_and_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("npo_core.deepspeed_learner.importlib.metadata.version", missing)
    config = Config.model_validate(
        {"run": {"name": "t", "store": f"file://{tmp_path}/store"}, "learner": {"engine": "deepspeed"}}
    )
    with pytest.raises(ConfigurationError, match=r"needs DeepSpeed, which is not installed; `make setup-engines`"):
        begin(config)
    assert not list(tmp_path.rglob("*.json"))
