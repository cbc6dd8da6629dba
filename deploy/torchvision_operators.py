"""Lets PyPI's torchvision be imported beside a CPU build of torch, in vLLM's environment.

vLLM's models that see import torchvision. PyPI's is built for CUDA: beside a CPU build of torch its compiled operators
cannot be loaded, and its import fails where it describes two of them that are not there. Nothing here uses them, and
what cuts pictures does without. `make setup-vllm` installs this file beside a `.pth` that imports it, so that it holds
for vLLM's child processes too. Where the operators are there it does nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

DESCRIBING = "torchvision._meta_registrations"
ABSENT = ("nms", "qnms")
_declared: list[object] = []
"""A declaration lasts as long as its library does."""


class Declaring(MetaPathFinder):
    """Finds no module, but declares the operators before torchvision describes them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """None; see the class."""
        if fullname == DESCRIBING and not _declared:
            import torch

            library = torch.library.Library("torchvision", "FRAGMENT")
            for name in ABSENT:
                if not hasattr(torch.ops.torchvision, name):
                    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _declared.append(library)
        return None


sys.meta_path.insert(0, Declaring())
