"""The compose file, and what the image holds: shared by the tests of the files and of their commands."""

from __future__ import annotations

import os
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import yaml

from tests.command import ROOT

DEPLOY = ROOT / "deploy"
HOME = Path("/opt/near-future")
"""Where the image has the project."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
SECRETS = {
    "POSTGRES_PASSWORD": "p@ss/w:rd",
    "PREFECT_AUTH_STRING": "admin:a long:word",
    "AWS_ACCESS_KEY_ID": "near-future",
    "AWS_SECRET_ACCESS_KEY": "not-a-secret",
}
BIN = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def pinned(package: str) -> str:
    """The exact version that pyproject.toml asks for."""
    every = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
    return next(one.split("==")[1] for one in every if one.startswith(f"{package}=="))


def image(folder: Path) -> Path:
    """The project as the image has it: what the ignore file lets through."""
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    for path in [line[1:] for line in lines if line.startswith("!")]:
        target = folder / HOME.name / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / path).is_dir():
            shutil.copytree(ROOT / path, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / path, target)
    return folder / HOME.name
