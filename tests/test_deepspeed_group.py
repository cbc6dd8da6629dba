"""What the DeepSpeed learner refuses before it starts a process; DeepSpeed itself is not needed for that."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from npo_core.deepspeed_learner import LONGEST_TMPDIR, Group, require_gpus
from npo_core.interfaces import ConfigurationError
from tests.test_learner import config


def test_a_scratch_directory_too_long_for_a_socket_is_named_and_left_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / ("x" * LONGEST_TMPDIR)
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    with pytest.raises(ConfigurationError, match=rf"TMPDIR {scratch}: .* path of at most {LONGEST_TMPDIR} bytes"):
        Group(config(learner={"engine": "deepspeed"}))
    assert not list(scratch.iterdir())


def test_ranks_beyond_the_gpus_are_refused() -> None:
    require_gpus(2, 2)
    with pytest.raises(
        ConfigurationError, match=r"deepspeed\.ranks 3 wants 3 GPUs, and this machine shows 2; lower it"
    ):
        require_gpus(3, 2)
