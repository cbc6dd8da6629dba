"""The objective."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from schemas.section import Section


class AlgorithmSection(Section):
    """GRPO's objective, and NPO's mixing of guide trajectories into hard groups."""

    method: Literal["grpo", "npo", "autonpo"] = "grpo"
    """`grpo` trains on-policy; `npo` runs the interventions of `future.interventions`; `autonpo` decides by itself when
    to roll back, and how far."""
    advantage_scale: Literal["group-std", "none"] = "group-std"
    """`group-std` divides the centred rewards by the group's unbiased std (GRPO); `none` does not (Dr.GRPO)."""
    advantage_eps: float = Field(1e-6, ge=0)
    """Added to the group's std."""
    aggregation: Literal["seq-mean-token-mean", "token-mean", "seq-sum-norm"] = "seq-mean-token-mean"
    """How token losses are averaged: GRPO, DAPO, Dr.GRPO (sum over tokens divided by `max_new_tokens`)."""
    clip_low: float = Field(0.2, ge=0, lt=1)
    """ε_low: ratios are clipped below 1 − ε_low."""
    clip_high: float = Field(0.2, ge=0)
    """ε_high: ratios are clipped above 1 + ε_high."""
    kl_beta: float = Field(0.0, ge=0)
    """β, weight of the k3 estimate of the KL to the starting policy; 0 switches the reference forward off."""
    gate: float = Field(0.6, ge=0, le=1)
    """τ_gate: a group takes a guide trajectory if its group accuracy is at most this (inclusive)."""
    slot: Literal["last", "failed"] = "last"
    """Which slot of a hard group the guide trajectory takes: the last (the paper) or the last failed one."""
    guide_slots: int = Field(1, ge=1)
    """Most slots of a hard group that guide trajectories take, each its own one: 1 is the paper."""
    guide_correction: Literal["none", "exact", "truncated", "shaped"] = "none"
    """Importance correction of the guide slot."""
    truncation_cap: float = Field(2.0, gt=0)
    """c of `truncated`: largest detached importance weight."""
    shaping_gamma: float = Field(0.1, gt=0)
    """γ of `shaped`: f(ρ) = ρ/(ρ+γ)."""
    sampling_correction: Literal["none", "token-truncated", "sequence-mask"] = "none"
    """Importance correction of the policy's own rows for the engine that sampled them, by the ratio ρ of the trainer's
    probabilities to the engine's: `token-truncated` weights each token by min(ρ, cap), `sequence-mask` every token by
    the row's product of ratios, and by 0 if it exceeds the cap. Guide rows have `guide_correction`."""
    sampling_cap: float = Field(2.0, gt=0)
    """c of `sampling_correction`: largest weight."""
