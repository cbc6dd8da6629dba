"""Which verifier a configuration means, and its name."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import TYPE_CHECKING

from npo_core.interfaces import ConfigurationError, Verifier
from npo_core.verifiers import choice, exact, gym, maths, numeric, python_function
from npo_core.verifiers.judges import Judge
from schemas.verifier import VerifierKind, VerifierSection

if TYPE_CHECKING:
    from schemas.config import Config

_BY_SOURCE: dict[str, VerifierKind] = {"testbed": "testbed", "shapes": "testbed", "reasoning-gym": "reasoning-gym"}
_LIBRARIES = {"math-verify": maths.VERSION, "reasoning-gym": gym.VERSION}
"""Kinds that a distribution of the same name judges for, and the version of what is ours in them."""
_OURS = {"exact": exact.VERSION, "numeric": numeric.VERSION, "choice": choice.VERSION}
_BUILDERS: dict[VerifierKind, Callable[[VerifierSection], Judge]] = {
    "exact": exact.build,
    "numeric": numeric.build,
    "choice": choice.build,
    "math-verify": maths.build,
    "reasoning-gym": gym.build,
    "python": python_function.build,
}


def load_verifier(config: Config) -> Verifier:
    """The verifier of the configuration's prompts. Its processes start with the first verdict; close it.

    Raises:
        ConfigurationError: what it needs is not installed, or `verifier.function` is not there.
    """
    section = resolved(config)
    if section.kind == "testbed":
        from npo_core import testbed

        return testbed.TestbedVerifier()
    from npo_core.verifiers.pool import PooledVerifier

    return PooledVerifier(name(section), section)


def resolved(config: Config) -> VerifierSection:
    """The section with the kind that `auto` means for these prompts."""
    section = config.verifier
    if section.kind != "auto":
        return section
    return section.model_copy(update={"kind": _BY_SOURCE.get(config.data.source, "math-verify")})


def name(section: VerifierSection) -> str:
    """`name/version` of a kind that judges in processes.

    Raises:
        ConfigurationError: see `load_verifier`.
    """
    if section.kind == "python":
        return python_function.name(section)
    if section.kind in _OURS:
        return f"{section.kind}/{_OURS[section.kind]}"
    try:
        version = importlib.metadata.version(section.kind)
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigurationError(
            f"verifier.kind {section.kind} needs a package that is not installed: "
            "pip install 'near-future[verifiers]', or choose another verifier.kind"
        ) from error
    return f"{section.kind}/{version}+{_LIBRARIES[section.kind]}"


def build(section: VerifierSection) -> Judge:
    """The judge of a kind, in the process that it judges in."""
    return _BUILDERS[section.kind](section)
