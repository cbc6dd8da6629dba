"""One process of a learner's group among the others."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The group, which `deepspeed.init_distributed` has made in this process.

    Args:
        cuda: whether each rank computes on a GPU of its own.
    """

    def __init__(self, cuda: bool) -> None:
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self.first = self.rank == 0
        self.device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu")
        # On the CPU in any case. The ranks wait in it for the next command while somebody samples: that may take long.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(days=365))

    def share(self, message: bytes | None) -> bytes:
        """The first rank's message, in every rank; the others give None."""
        size = torch.tensor([len(message or b"")])
        dist.broadcast(size, 0, group=self._group)
        data = torch.frombuffer(bytearray(message), dtype=torch.uint8) if message else torch.zeros(int(size)).byte()
        dist.broadcast(data, 0, group=self._group)
        return data.numpy().tobytes()

    def total(self, values: Tensor) -> Tensor:
        """The sum over the ranks, in every rank."""
        dist.all_reduce(values, group=self._group)
        return values

    def largest(self, value: Tensor) -> Tensor:
        """The maximum over the ranks, in every rank."""
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self._group)
        return value
