"""DeepSpeed computes what the torch learner does, takes over its runs and gives them back, and leaves no process."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from npo_core.deepspeed_learner import DeepSpeedLearner
from npo_core.interfaces import LocalCheckpoint, NearFutureError
from npo_core.learner import OPTIMIZER_FILE, STATE_FILE, TorchLearner
from npo_core.padding import rank_batches
from schemas.config import Config
from schemas.model import ModelSection
from tests.command import ROOT
from tests.test_learner import RATE, batch, config
from tests.test_sampling_correction import perturbed
from tests.tiny import VOCAB, tiny_policy

pytestmark = pytest.mark.engines

TOLERANCE = 2e-6
"""Relative L2 distance of weights after six steps: float32 sums in another order."""


def settings(ranks: int, stage: int, **learner: Any) -> Config:
    return config(
        learner={"engine": "deepspeed", "micro_batch_tokens": 40, "warmup_steps": 4, "max_grad_norm": 0.1, **learner},
        deepspeed={"ranks": ranks, "zero_stage": stage},
    )


@contextmanager
def deepspeed(path: Path, settings_: Config) -> Iterator[DeepSpeedLearner]:
    learner = DeepSpeedLearner(tiny_policy(path, settings_.model.dtype), settings_)
    try:
        yield learner
    finally:
        learner.close()


def torch_learner(path: Path, settings_: Config) -> TorchLearner:
    return TorchLearner(tiny_policy(path, micro_batch_tokens=40), settings_)


def steps(learner: Any, start: int, stop: int) -> list[dict[str, float]]:
    # One batch has rows of one group only, one has no gradient at all.
    groups = [(1,), (), (0, 2), (0, 1, 2), (1,), ()]
    return [learner.step(batch(step, groups[step])) for step in range(start, stop)]


def distance(one: Path, other: Path) -> float:
    """Relative L2 distance of two saved checkpoints' weights."""
    a, b = (load_file(path / "weights" / "model.safetensors") for path in (one, other))
    assert a.keys() == b.keys()
    difference = sum(float((a[name].double() - b[name].double()).square().sum()) for name in a)
    return (difference / sum(float(value.double().square().sum()) for value in b.values())) ** 0.5


def start(path: Path, settings_: Config) -> LocalCheckpoint:
    """A checkpoint of the first step."""
    torch_learner(path / "model", settings_).save(path / "start")
    return LocalCheckpoint(path / "start", "0" * 64, 0)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (1, 2), (2, 0), (2, 1), (2, 2), (2, 3)])
def test_it_computes_what_torch_does_and_they_take_over_from_each_other(tmp_path: Path, ranks: int, stage: int) -> None:
    settings_ = settings(ranks, stage)
    longest = [len(p) + len(c) for p, c in zip(batch(3).prompt_ids, batch(3).completion_ids, strict=True)]
    assert min(map(len, rank_batches(longest, ranks, settings_.learner.micro_batch_tokens))) > 1, "passes must add up"
    first = start(tmp_path, settings_)
    alone = torch_learner(tmp_path / "alone", settings_)
    alone.load(first, RATE)
    wanted = steps(alone, 0, 3)
    alone.save(tmp_path / "torch-3")
    wanted += steps(alone, 3, 6)
    alone.save(tmp_path / "torch-6")
    with deepspeed(tmp_path / "ours", settings_) as ours:
        ours.load(first, RATE)
        found = steps(ours, 0, 3)
        ours.save(tmp_path / "deepspeed-3")
        found += steps(ours, 3, 6)
        ours.save(tmp_path / "deepspeed-6")
        logps = ours.log_probs(batch(0).prompt_ids, batch(0).completion_ids)
        ours.load(LocalCheckpoint(tmp_path / "torch-3", "0" * 64, 3), RATE)
        steps(ours, 3, 6)
        ours.save(tmp_path / "taken-over-6")
    in_torch = alone.log_probs(batch(0).prompt_ids, batch(0).completion_ids)
    alone.load(LocalCheckpoint(tmp_path / "deepspeed-3", "0" * 64, 3), RATE)
    steps(alone, 3, 6)
    alone.save(tmp_path / "given-back-6")
    for name in ("deepspeed-6", "taken-over-6", "given-back-6"):
        print(ranks, stage, name, distance(tmp_path / name, tmp_path / "torch-6"))
        assert distance(tmp_path / name, tmp_path / "torch-6") < TOLERANCE
    assert max(metrics["grad_norm"] for metrics in wanted) > settings_.learner.max_grad_norm, "clipping must act"
    for ours_, theirs in zip(found, wanted, strict=True):
        assert ours_ == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    for one, other in zip(logps, in_torch, strict=True):
        assert np.concatenate(one) == pytest.approx(np.concatenate(other), rel=1e-4, abs=1e-4)


def test_a_run_goes_on_with_fewer_ranks_and_another_stage(tmp_path: Path) -> None:
    first = start(tmp_path, settings(2, 3))
    alone = torch_learner(tmp_path / "alone", settings(1, 0))
    alone.load(first, RATE)
    steps(alone, 0, 6)
    alone.save(tmp_path / "torch-6")
    for ranks, stage, begin, end in ((2, 3, 0, 3), (1, 1, 3, 6)):
        with deepspeed(tmp_path / f"model-{ranks}", settings(ranks, stage)) as ours:
            ours.load(first if not begin else LocalCheckpoint(tmp_path / f"by-{begin}", "0" * 64, begin), RATE)
            steps(ours, begin, end)
            ours.save(tmp_path / f"by-{end}")
    assert distance(tmp_path / "by-6", tmp_path / "torch-6") < TOLERANCE


def test_the_float32_weights_behind_bfloat16_ones_go_through_a_checkpoint_bit_by_bit(tmp_path: Path) -> None:
    from npo_core.zero import MASTER_FILE  # it loads DeepSpeed

    settings_ = settings(1, 2).model_copy(update={"model": ModelSection(dtype="bfloat16")})
    first = start(tmp_path, settings_)
    with deepspeed(tmp_path / "ours", settings_) as ours:
        ours.load(first, RATE)
        steps(ours, 0, 3)
        ours.save(tmp_path / "at-3")
        steps(ours, 3, 6)
        ours.save(tmp_path / "at-6")
        ours.load(LocalCheckpoint(tmp_path / "at-3", "0" * 64, 3), RATE)
        steps(ours, 3, 6)
        ours.save(tmp_path / "resumed-6")
    weights, masters = (load_file(tmp_path / "at-3" / name) for name in ("weights/model.safetensors", MASTER_FILE))
    assert masters.keys() == weights.keys()
    for name, master in masters.items():
        assert (master.dtype, weights[name].dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(master.bfloat16(), weights[name])
    assert any((masters[name] != weights[name].float()).any() for name in masters), "rounding must cost something"
    for name in ("weights/model.safetensors", OPTIMIZER_FILE, MASTER_FILE, STATE_FILE):
        assert (tmp_path / "resumed-6" / name).read_bytes() == (tmp_path / "at-6" / name).read_bytes(), name


@pytest.mark.parametrize(("ranks", "correction"), [(1, "token-truncated"), (2, "sequence-mask")])
def test_it_corrects_for_the_sampler_as_torch_does(tmp_path: Path, ranks: int, correction: str) -> None:
    """Metrics too: sums and a maximum over micro-batches and ranks."""
    algorithm = {"algorithm": {"sampling_correction": correction, "sampling_cap": 1.3}}
    settings_ = settings(ranks, 2).model_copy(update={"algorithm": config(**algorithm).algorithm})
    first = start(tmp_path, settings_)
    alone = torch_learner(tmp_path / "alone", settings_)
    alone.load(first, RATE)
    data = [perturbed(alone.policy, settings_, batch(step)) for step in range(2)]
    wanted = [alone.step(one) for one in data]
    alone.save(tmp_path / "torch-2")
    with deepspeed(tmp_path / "ours", settings_) as ours:
        ours.load(first, RATE)
        found = [ours.step(one) for one in data]
        ours.save(tmp_path / "deepspeed-2")
    assert distance(tmp_path / "deepspeed-2", tmp_path / "torch-2") < TOLERANCE
    for ours_, theirs in zip(found, wanted, strict=True):
        assert 0 < theirs["sampling/corrected"] < 1
        assert ours_ == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def processes(learner: DeepSpeedLearner) -> list[psutil.Process]:
    """Of the learner's group: launcher, supervisor, ranks."""
    assert learner._group is not None
    session = str(learner._group.session)
    return [p for p in psutil.process_iter() if p.status() != psutil.STATUS_ZOMBIE and session in shown(p)]


def shown(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return " ".join(process.cmdline())
    return ""


def ends(group: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(group, timeout=60)[1]


def test_a_rank_that_fails_is_named_and_takes_the_others_along(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings_ = settings(2, 2)
    first = start(tmp_path, settings_)
    caplog.set_level(logging.INFO, logger="npo")
    with deepspeed(tmp_path / "ours", settings_) as ours:
        ours.load(first, RATE)
        group = processes(ours)
        assert len(group) == 4
        wrong = batch(1, ())
        # One row is of no token that the model knows: that of the second rank, as it is the second longest.
        order = sorted(range(12), key=lambda i: -len(wrong.prompt_ids[i]) - len(wrong.completion_ids[i]))
        wrong.completion_ids[order[1]][0] = VOCAB + 5
        with pytest.raises(NearFutureError, match=r"rank 1 of 2: IndexError: .*; the log has its traceback") as raised:
            ours.step(wrong)
        assert "\n" not in str(raised.value)
        assert "Traceback (most recent call last)" in caplog.text
        assert ends(group)
        ours.load(first, RATE)
        assert steps(ours, 0, 1), "a fresh group takes its place"


def test_a_rank_that_is_killed_is_named(tmp_path: Path) -> None:
    settings_ = settings(2, 0)
    first = start(tmp_path, settings_)
    with deepspeed(tmp_path / "ours", settings_) as ours:
        ours.load(first, RATE)
        group = processes(ours)
        next(p for p in group if "deepspeed_rank" in shown(p) and p.environ().get("RANK") == "1").kill()
        with pytest.raises(NearFutureError, match=r"rank 1 of 2 was ended from outside \(exit code -9\)"):
            steps(ours, 0, 1)
        assert ends(group)


def test_a_launcher_that_is_killed_while_its_ranks_begin_leaves_none(tmp_path: Path) -> None:
    settings_ = settings(2, 0)
    first = start(tmp_path, settings_)
    with deepspeed(tmp_path / "ours", settings_) as ours, ThreadPoolExecutor(1) as pool:
        loading = pool.submit(ours.load, first, RATE)
        ranks: list[psutil.Process] = []
        while not ranks:
            assert not loading.done()
            launchers = [p for p in psutil.Process().children(recursive=True) if "--standalone" in shown(p).split()]
            ranks = [rank for p in launchers if "supervised" not in shown(p) for rank in p.children()]
        launcher = ranks[0].parent()
        assert launcher is not None
        launcher.kill()
        with pytest.raises(NearFutureError, match="its launcher was ended from outside"):
            loading.result(timeout=15)
        assert not psutil.wait_procs(ranks, timeout=5)[1]


def test_a_loss_that_is_not_finite_names_the_step(tmp_path: Path) -> None:
    settings_ = settings(1, 1)
    first = start(tmp_path, settings_)
    with deepspeed(tmp_path / "ours", settings_) as ours:
        ours.load(first, RATE)
        broken = batch(1, ())
        broken.advantages_B[3] = np.nan
        with pytest.raises(FloatingPointError, match="step 1"):
            ours.step(broken)


def test_nothing_is_compiled_whose_lock_a_killed_rank_would_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "compiled"))
    settings_ = settings(1, 1)
    first = start(tmp_path, settings_)
    with deepspeed(tmp_path / "ours", settings_) as ours:
        ours.load(first, RATE)
        steps(ours, 0, 1)
    assert not (tmp_path / "compiled").exists()


def test_killed_we_leave_no_process(tmp_path: Path) -> None:
    first = start(tmp_path, settings(2, 1))
    code = (
        "import sys, time; from pathlib import Path\n"
        "from npo_core.interfaces import LocalCheckpoint\n"
        "from tests.test_deepspeed_learner import DeepSpeedLearner, RATE, processes, settings, tiny_policy\n"
        f"learner = DeepSpeedLearner(tiny_policy(Path({str(tmp_path / 'theirs')!r})), settings(2, 1))\n"
        f"learner.load(LocalCheckpoint(Path({str(first.path)!r}), '0' * 64, 0), RATE)\n"
        "print('up', *(p.pid for p in processes(learner)), flush=True); time.sleep(1000)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        up = next(line for line in parent.stdout if line.startswith("up"))
        group = [psutil.Process(int(pid)) for pid in up.split()[1:]]
        assert len(group) == 4
        parent.send_signal(signal.SIGKILL)
    assert ends(group)
