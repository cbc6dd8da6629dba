"""A rank of the DeepSpeed learner, once `npo_core.deepspeed_rank` watches over it.

SESSION, its argument, is the directory of `npo_core.deepspeed_learner`: its `config.json`, the socket at which the
first rank takes commands, and for every rank that fails a `failed-RANK.json`.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
import warnings
from pathlib import Path

import deepspeed
import numpy as np
import torch
import torch.distributed as dist

from npo_core import frames
from npo_core.deepspeed_messages import CONFIG_FILE, FAILURE, SOCKET, batch_of, rows_of
from npo_core.interfaces import LocalCheckpoint
from npo_core.policy import choose_device
from npo_core.ranks import Ranks
from npo_core.zero import ZeroPolicy
from schemas.config import Config


class Worker:
    """Carries out commands, in every rank the same ones."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self._policy: ZeroPolicy | None = None

    def run(self, message: bytes) -> bytes:
        """Carries out one command; the answer counts in the first rank."""
        command, arrays = frames.unpack(message)
        match command["do"]:
            case "load":
                if self._policy is not None:
                    self._policy.close()
                checkpoint = LocalCheckpoint(Path(command["path"]), command["digest"], command["step"])
                self._policy = ZeroPolicy(self.config, self.ranks, checkpoint, command["learning_rate"])
                return frames.pack({})
            case "step":
                return frames.pack(self.policy.step(*batch_of(command["step"], arrays)))
            case "log_probs":
                logps, entropies = self.policy.log_probs(*rows_of(arrays))
                return frames.pack(
                    {}, frames.ragged("logps", logps, np.float32) | frames.ragged("entropies", entropies, np.float32)
                )
            case "write_weights":
                self.policy.write_weights(Path(command["path"]))
                return frames.pack({})
            case "save":
                self.policy.save(Path(command["path"]))
                return frames.pack({})
        raise ValueError(f"unknown command {command['do']!r}")

    @property
    def policy(self) -> ZeroPolicy:
        """What was loaded."""
        assert self._policy is not None, "nothing is loaded"
        return self._policy


def serve(session: Path) -> None:
    """Carries out the learner's commands until it is gone."""
    config = Config.model_validate_json((session / CONFIG_FILE).read_text())
    device = choose_device(config.learner.device)
    torch.set_num_threads(config.learner.threads)
    torch.use_deterministic_algorithms(device.type == "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Inference alone uses it. It would be compiled here, under a lock that a rank killed meanwhile leaves to all later
    # ones, which then wait for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo")
    ranks = Ranks(device.type == "cuda")
    worker = Worker(config, ranks)
    if not ranks.first:
        while message := ranks.share(None):
            worker.run(message)
        return
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(session / SOCKET))
        try:
            while True:
                frames.send(connection, worker.run(ranks.share(frames.receive(connection))))
        except frames.DisconnectedError:
            ranks.share(b"")


def main(session: Path) -> None:
    """Runs a rank; its failure is written down for the learner and goes on to the log."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls what torch has renamed, once a layer and step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    try:
        serve(session)
    except Exception as error:
        rank = os.environ.get("RANK", "0")
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        failure = {"rank": int(rank), "type": type(error).__name__, "reason": reason, "at": time.time_ns()}
        # Whole or not at all: the launcher may kill this rank for another's failure at any moment.
        (unfinished := session / f"{rank}.unfinished").write_text(json.dumps(failure))
        unfinished.rename(session / FAILURE.format(rank))
        raise
    dist.destroy_process_group()
