"""The tree says what it holds."""

from __future__ import annotations

import re
from pathlib import Path

import npo_core


def test_the_index_of_npo_core_names_every_module_once() -> None:
    folder = Path(npo_core.__file__).parent
    modules = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    index = (npo_core.__doc__ or "").partition("What lies where:")[2]
    entries = [" ".join(entry.split()).partition(": ")[2] for entry in re.split(r"^- ", index, flags=re.MULTILINE)[1:]]
    named = [name for entry in entries for name in entry.split(", ")]
    assert sorted(named) == sorted(modules - {"__init__"})
