"""From ragged rows to padded tensors and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor


def pad(rows: Sequence[np.ndarray], side: Literal["left", "right"], device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids_BL, mask_BL), int64, padded on that side: left as generation wants it, right as training does.

    Pads are id 0 and masked.
    """
    width = max(len(row) for row in rows)
    ids_BL, mask_BL = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(len(row))
        ids_BL[i, place] = row
        mask_BL[i, place] = 1
    return torch.from_numpy(ids_BL).to(device), torch.from_numpy(mask_BL).to(device)


def positions(mask_BL: Tensor) -> Tensor:
    """Position ids counted over real tokens, int64 [B, L]; pads get 0."""
    return (mask_BL.cumsum(dim=1) - 1).clamp(min=0)


def length_sorted_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Row indices, longest first, in micro-batches of at most `max_tokens` padded tokens (and at least one row)."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for i in order:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def pad_rows(rows: Sequence[np.ndarray | None], width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Values [B, width], right-padded with 0; a row that is None is all 0."""
    values_BT = np.zeros((len(rows), width))
    for i, row in enumerate(rows):
        if row is not None:
            values_BT[i, : len(row)] = row
    return torch.from_numpy(values_BT).to(device, dtype)


def rank_batches(lengths: Sequence[int], ranks: int, max_tokens: int) -> list[list[list[int]]]:
    """Every rank's micro-batches (see `length_sorted_batches`), of about as many tokens each.

    All ranks have equally many, one at least: where rows are wanting, some are empty at the end.
    """
    rows: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = tokens.index(min(tokens))
        rows[rank].append(i)
        tokens[rank] += lengths[i]
    batches = [
        [[own[j] for j in batch] for batch in length_sorted_batches([lengths[i] for i in own], max_tokens)]
        for own in rows
    ]
    most = max(1, *map(len, batches))
    return [own + [[]] * (most - len(own)) for own in batches]
