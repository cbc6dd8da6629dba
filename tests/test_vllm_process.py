"""The process around vLLM as far as it goes without vLLM: what is said when it cannot start."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from npo_core.interfaces import ConfigurationError, NearFutureError, StreamKey
from npo_core.streams import row_seed
from npo_core.vllm_process import VllmProcess, visible_devices
from schemas.vllm import VllmSection


def test_a_missing_environment_is_named_with_the_command_that_makes_it(tmp_path: Path) -> None:
    process = VllmProcess(VllmSection(python=str(tmp_path / "python")), "float32", "cpu")
    with pytest.raises(ConfigurationError, match=r"vllm\.python .*/python is not there; `make setup-vllm`"):
        process.fresh(tmp_path)


def test_an_environment_without_vllm_is_told_by_what_its_process_says(tmp_path: Path) -> None:
    process = VllmProcess(VllmSection(python=sys.executable), "float32", "cpu")
    with pytest.raises(NearFutureError, match="could not load: ModuleNotFoundError: No module named 'vllm'"):
        process.fresh(tmp_path)
    assert not process.started, "there is no engine to give other weights to"
    process.close()


def test_a_process_that_dies_is_told_with_its_last_words(tmp_path: Path) -> None:
    dying = tmp_path / "python"
    dying.write_text("#!/bin/sh\necho out of memory >&2\nexit 3\n")
    os.chmod(dying, 0o755)
    process = VllmProcess(VllmSection(python=str(dying)), "float32", "cpu")
    with pytest.raises(NearFutureError, match=r"(?s)ended while it was asked to load.*out of memory"):
        process.fresh(tmp_path)
    assert not process.started


@pytest.mark.parametrize(
    ("device", "count", "ours", "theirs"),
    [
        ("cpu", 1, "2,3", None),
        ("cuda", 1, None, "0"),
        ("cuda:3", 1, None, "3"),
        ("cuda:1", 2, None, "1,2"),
        ("cuda", 1, "2,3", "2"),
        ("cuda:1", 1, "GPU-5a,GPU-1c", "GPU-1c"),
        ("cuda", 2, "4,6,7", "4,6"),
    ],
)
def test_it_sees_the_trainers_device_and_those_after_it_alone(
    device: str, count: int, ours: str | None, theirs: str | None
) -> None:
    environment = {} if ours is None else {"CUDA_VISIBLE_DEVICES": ours}
    assert visible_devices(device, count, environment) == ({} if theirs is None else {"CUDA_VISIBLE_DEVICES": theirs})


def test_more_devices_than_we_see_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"tensor_parallel_size 2 .* learner\.device cuda:1 .* 4,5 shows 2"):
        visible_devices("cuda:1", 2, {"CUDA_VISIBLE_DEVICES": "4,5"})


def test_its_process_is_told_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    telling = tmp_path / "python"
    telling.write_text('#!/bin/sh\necho "sees $CUDA_VISIBLE_DEVICES."\n')
    os.chmod(telling, 0o755)
    process = VllmProcess(VllmSection(python=str(telling)), "float32", "cuda:1")
    with pytest.raises(NearFutureError, match=r"sees 5\."):
        process.fresh(tmp_path)


def test_a_rows_seed_is_its_keys_alone_and_fits_64_bits() -> None:
    keys = [StreamKey(3, "guide", 5, f"p{p}", slot) for p in range(20) for slot in range(5)]
    seeds = [row_seed(key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert seeds[7] == row_seed(keys[7])
    assert all(0 <= seed < 2**63 for seed in seeds)
