"""Make torchvision importable beside a torch that lacks its compiled operators.

torchvision's wheel carries operators compiled for one torch build; beside another (CPU torch, say) they do
not load and `import torchvision`, hence timm, dies with «operator torchvision::nms does not exist». We call
none of those operators, so declaring their schemas is enough. Where torchvision is sound, nothing happens.
"""

from functools import cache
from types import ModuleType

from bioscan.errors import MissingExtraError, require

_DECLARED: list[object] = []  # torch forgets a declaration when its Library object goes


@cache
def import_timm() -> ModuleType:
    """timm, with torchvision mended first where that is needed."""
    torch = require("torch", "learn")
    try:
        import torchvision
    except ModuleNotFoundError:
        raise MissingExtraError("this needs the 'learn' extra: pip install 'bioscan[learn]'") from None
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(library)
        import torchvision  # noqa: F401
    return require("timm", "learn")
