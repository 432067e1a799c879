"""The timm building blocks the model uses, imported past a torchvision that does not match a CPU build of torch.

torchvision's wheel is built for CUDA; beside a CPU torch its import fails because its compiled operators are absent.
Declaring the two operators that it registers fake kernels for is enough to import it; nothing here ever calls them.
Where the real library loads (CUDA, ROCm) nothing is declared.
"""

from __future__ import annotations

import sys

import torch

_OPERATORS: list[torch.library.Library] = []  # a Library undefines its operators when it is collected


def _import_torchvision() -> None:
    try:
        import torchvision
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _OPERATORS.append(library)
        for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[module]
        import torchvision  # noqa: F401


_import_torchvision()

from timm.layers import DropPath, Mlp, trunc_normal_  # noqa: E402

__all__ = ["DropPath", "Mlp", "trunc_normal_"]
