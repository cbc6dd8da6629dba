"""The DeepSpeed learner as a segment sees it: a supervised process group, its commands, its log and its failures."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import re
import selectors
import socket
import tempfile
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from npo_core import frames
from npo_core.deepspeed_messages import CONFIG_FILE, FAILURE, SOCKET, batch_arrays, row_arrays
from npo_core.interfaces import ConfigurationError, LocalCheckpoint, NearFutureError, TrainBatch
from npo_core.launch import launch_command
from npo_core.policy import Policy, choose_device
from npo_core.supervised import Supervised
from npo_core.update import Update, reference_logps
from schemas.config import Config

logger = logging.getLogger("npo")

LOOK_S = 2.0
"""How often a wait looks whether the launcher still runs."""

LONGEST_TMPDIR = 80
"""Bytes. The path of a Unix socket may have 107 on Linux and 103 on macOS, and ours adds `/npo-XXXXXXXX/socket`."""


def deepspeed_version() -> str:
    """The version that is installed.

    Raises:
        ConfigurationError: none is.
    """
    try:
        return importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigurationError(
            "learner.engine deepspeed needs DeepSpeed, which is not installed; `make setup-engines` installs it, "
            "or use learner.engine torch"
        ) from error


class DeepSpeedLearner:
    """Updates a policy in processes of its own, which start with the first `load`.

    Args:
        policy: takes the new weights after every step, for the generator of this process.
        config: the run's.
        reference: the starting policy, needed iff `algorithm.kl_beta` > 0; computed with in this process.

    Raises:
        ConfigurationError: DeepSpeed is not installed.
    """

    def __init__(self, policy: Policy, config: Config, reference: Policy | None = None) -> None:
        deepspeed_version()
        self.policy, self.config, self.reference = policy, config, reference
        self._group: Group | None = None

    def load(self, checkpoint: LocalCheckpoint, learning_rate: float) -> None:
        """See `Learner.load`."""
        if self._group is None or self._group.ended:
            self._group = Group(self.config)
        place = {"path": str(checkpoint.path), "digest": checkpoint.digest, "step": checkpoint.step}
        self._group.call({"do": "load", **place, "learning_rate": learning_rate})
        self.policy.load_weights(checkpoint.weights)

    def log_probs(
        self, prompts: Sequence[np.ndarray], completions: Sequence[np.ndarray]
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """See `Learner.log_probs`."""
        _, arrays = self._running.call({"do": "log_probs"}, row_arrays(prompts, completions))
        return frames.rows_of("logps", arrays), frames.rows_of("entropies", arrays)

    def step(self, batch: TrainBatch) -> dict[str, float]:
        """See `Learner.step`."""
        reference = None
        if self.reference:
            reference = reference_logps(self.reference, Update.of(batch, self.config.algorithm, self.config.rollout))
        metrics, _ = self._running.call({"do": "step", "step": batch.step}, batch_arrays(batch, reference))
        self._take_weights()
        return metrics

    def save(self, target: Path) -> None:
        """See `Learner.save`."""
        self._running.call({"do": "save", "path": str(target)})

    def close(self) -> None:
        """Ends the processes."""
        if self._group:
            self._group.close()

    @property
    def _running(self) -> Group:
        if self._group is None:
            raise RuntimeError("no checkpoint is loaded")
        return self._group

    @torch.no_grad()
    def _take_weights(self) -> None:
        path = self._running.session / "weights.safetensors"
        self._running.call({"do": "write_weights", "path": str(path)})
        fresh = load_file(path)
        for name, parameter in self.policy.parameters.items():
            parameter.copy_(fresh[name])
        path.unlink()


class Group:
    """The ranks, started at once; gone when this process is, or this object.

    Their log lines come out while a command is waited for: in the thread, and so under the task, that gave it.

    Raises:
        ConfigurationError: this machine shows fewer GPUs than `deepspeed.ranks`, or TMPDIR is too long.
        NearFutureError: the ranks ended before they took commands.
    """

    def __init__(self, config: Config) -> None:
        if choose_device(config.learner.device).type == "cuda":
            require_gpus(config.deepspeed.ranks, torch.cuda.device_count())
        self.ranks = config.deepspeed.ranks
        directory = tempfile.TemporaryDirectory(prefix="npo-")
        self.session = Path(directory.name)
        (self.session / CONFIG_FILE).write_text(config.model_dump_json())
        with socket.socket(socket.AF_UNIX) as listener:
            _bind(listener, directory)
            listener.listen(1)
            self._process = Supervised(launch_command(config.deepspeed, self.session), environment(config))
            os.set_blocking(self._process.output.fileno(), False)
            self.close = weakref.finalize(self, _end, self._process, directory)
            self._last: deque[str] = deque(maxlen=200)
            self._unfinished = b""
            self._wait_for(listener)
            self._connection, _ = listener.accept()

    @property
    def ended(self) -> bool:
        """Whether the processes are gone."""
        return self._process.poll() is not None

    def call(
        self, command: dict[str, Any], arrays: dict[str, np.ndarray] | None = None
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Gives a command and waits for the answer.

        Raises:
            FloatingPointError: something is not finite; names the step.
            NearFutureError: a rank failed; names it and says why.
        """
        try:
            frames.send(self._connection, frames.pack(command, arrays))
            self._wait_for(self._connection)
            return frames.unpack(frames.receive(self._connection))
        except frames.DisconnectedError:
            raise self._failure() from None

    def _wait_for(self, readable: socket.socket) -> None:
        """Passes log lines on until there is something to read."""
        with selectors.DefaultSelector() as selector:
            selector.register(readable, selectors.EVENT_READ)
            selector.register(self._process.output, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select(LOOK_S)]
                if self._process.output in ready and not self._pass_on():
                    raise self._failure()
                if readable in ready:
                    return
                # The output ends with the last process that has it, which need not be the launcher.
                if not ready and self.ended:
                    raise self._failure()

    def _pass_on(self) -> bool:
        """Logs what the ranks have printed; False if they will print no more."""
        printed = self._process.output.read()
        if printed is None:
            return True
        *lines, self._unfinished = (self._unfinished + printed).split(b"\n")
        for line in lines:
            self._last.append(line.decode(errors="replace").rstrip())
            logger.info("deepspeed: %s", self._last[-1])
        return bool(printed)

    def _failure(self) -> Exception:
        """What went wrong, after the last line of the log."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.output, selectors.EVENT_READ)
            while selector.select(LOOK_S) and self._pass_on():
                pass
        failures = [json.loads(path.read_text()) for path in self.session.glob(FAILURE.format("*"))]
        # A rank that is left alone fails too, for the others are gone: the launcher knows whose end came first.
        rank, code = _root_cause(self._last)
        first = min(failures, key=lambda failure: (failure["rank"] != rank, failure["at"]), default=None)
        self.close()
        if first is None or (rank is not None and first["rank"] != rank):
            who = "its launcher" if rank is None else f"rank {rank} of {self.ranks}"
            return NearFutureError(
                f"the DeepSpeed learner failed: {who} was ended from outside{f' (exit code {code})' if code else ''}; "
                "the log has what it printed; if memory ran out, lower learner.micro_batch_tokens or raise "
                "deepspeed.zero_stage"
            )
        if first["type"] == FloatingPointError.__name__:
            return FloatingPointError(first["reason"])
        return NearFutureError(
            f"the DeepSpeed learner failed: rank {first['rank']} of {self.ranks}: {first['type']}: {first['reason']}; "
            "the log has its traceback"
        )


def require_gpus(ranks: int, gpus: int) -> None:
    """Refuses ranks without a GPU of their own.

    Raises:
        ConfigurationError: there are fewer.
    """
    if ranks > gpus:
        raise ConfigurationError(
            f"deepspeed.ranks {ranks} wants {ranks} GPUs, and this machine shows {gpus}; lower it, show more by "
            "CUDA_VISIBLE_DEVICES, or set learner.device to cpu"
        )


def _bind(listener: socket.socket, directory: tempfile.TemporaryDirectory[str]) -> None:
    path = Path(directory.name) / SOCKET
    try:
        listener.bind(str(path))
    except OSError as error:
        directory.cleanup()
        raise ConfigurationError(
            f"TMPDIR {tempfile.gettempdir()}: no socket can be made at {path} ({error}); set TMPDIR to a directory "
            f"that may be written, by a path of at most {LONGEST_TMPDIR} bytes"
        ) from error


def environment(config: Config) -> dict[str, str]:
    """What the ranks find in their environment."""
    cpu = choose_device(config.learner.device).type == "cpu"
    return {
        "OMP_NUM_THREADS": str(config.learner.threads),
        "PYTHONUNBUFFERED": "1",
        **({"DS_ACCELERATOR": "cpu"} if cpu else {}),
    }


def _root_cause(lines: Sequence[str]) -> tuple[int | None, int | None]:
    """(rank, exit code) that torchrun's summary names."""
    summary = "\n".join(lines).rpartition("Root Cause")[2]
    found = re.search(r"rank\s*: (\d+).*?exitcode\s*: (-?\d+)", summary, re.DOTALL)
    return (int(found[1]), int(found[2])) if found else (None, None)


def _end(process: Supervised, directory: tempfile.TemporaryDirectory[str]) -> None:
    process.close()
    directory.cleanup()
