"""Prefect flows: one a stage (`flows.stages`, AutoNPO's in `flows.monitoring`), the composed pipelines
(`flows.pipeline`), what a deployment's flow run does beside its work (`flows.deployed`), and the command `npo`.

from flows import autonpo, grpo, npo
from npo_core.config_file import load_config

summary = npo(load_config("deploy/configs/testbed-npo.yaml", []))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flows.pipeline import autonpo, grpo, npo

__all__ = ["autonpo", "grpo", "npo"]


def __getattr__(name: str) -> Any:
    """Imports Prefect when a flow is asked for, not before: the command sets its environment first."""
    if name in __all__:
        from flows import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'flows' has no attribute {name!r}")
