"""A function of the user's."""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from collections.abc import Mapping
from importlib.machinery import PathFinder
from numbers import Real
from pathlib import Path
from typing import Any

from npo_core.interfaces import ConfigurationError, Verdict
from npo_core.verifiers.judges import Judge, Question, printable
from schemas.verifier import VerifierSection


def build(section: VerifierSection) -> Judge:
    """See `Judge`. Imports the module."""
    module, name = _parts(section)
    function = getattr(importlib.import_module(module), name)

    def judge(question: Question) -> Verdict:
        messages = [dict(message) for message in question.messages]
        return _verdict(
            function(answer=question.answer, text=question.text, prompt=messages, metadata=question.metadata)
        )

    return judge


def name(section: VerifierSection) -> str:
    """`python/module:function@hash`: the hash, 12 digits, is that of the source file of its module, which is not
    imported here; a module that this one imports may change unseen.

    Raises:
        ConfigurationError: there is no such module.
    """
    source = _source(_parts(section)[0])
    if source is None:
        raise ConfigurationError(
            f"verifier.function {section.function}: there is no module {_parts(section)[0]} with a source file in "
            f"{os.getcwd()} or among the installed packages; check the spelling, or set PYTHONPATH"
        )
    return f"python/{section.function}@{hashlib.sha256(source.read_bytes()).hexdigest()[:12]}"


def _parts(section: VerifierSection) -> tuple[str, str]:
    assert section.function is not None  # VerifierSection asks for it
    module, _, function = section.function.partition(":")
    return module, function


def _source(module: str) -> Path | None:
    """The module's source file, found without running any of it."""
    places: list[str] | None = [os.getcwd(), *sys.path]
    found = None
    path = ""
    for part in module.split("."):
        if places is None:
            return None
        path = f"{path}.{part}" if path else part
        found = PathFinder.find_spec(path, places)
        if found is None:
            return None
        within = found.submodule_search_locations
        places = None if within is None else list(within)
    file = Path(found.origin) if found is not None and found.origin else None
    return file if file is not None and file.suffix == ".py" and file.is_file() else None


def _verdict(returned: Any) -> Verdict:
    """What a function returned, as a verdict.

    Raises:
        TypeError: it is nothing of what it may be.
    """
    if isinstance(returned, Mapping):
        unknown = returned.keys() - {"reward", "correct", "reason"}
        if unknown or "reward" not in returned:
            raise TypeError(
                f"the function returned a dict with {sorted(map(str, returned))}, not reward, correct, reason"
            )
        reward = _reward(returned["reward"])
        correct = bool(returned.get("correct", reward >= 1))
        return Verdict(reward, correct, printable(str(returned.get("reason", _reason(reward, correct)))))
    reward = _reward(returned)
    return Verdict(reward, reward >= 1, _reason(reward, reward >= 1))


def _reward(value: Any) -> float:
    # numpy's numbers are registered as Real, its bool is not.
    if not isinstance(value, Real) and type(value).__name__ not in ("bool", "bool_"):
        raise TypeError(f"the function returned {printable(repr(value), 80)}, not a bool, a number or a dict")
    return float(value)


def _reason(reward: float, correct: bool) -> str:
    return "correct" if correct else f"reward {reward:g}"
