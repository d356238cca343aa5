"""Make torchvision importable beside a torch that lacks its compiled operators.

torchvision's wheel carries operators compiled for one torch build; beside another (CPU torch, say) they do
not load and `import torchvision`, hence timm and transformers, dies with «operator torchvision::nms does not
exist». We call none of those operators, so declaring their schemas is enough. Where torchvision is sound,
nothing happens.
"""

from functools import cache
from types import ModuleType

from bioscan.errors import MissingExtraError, require

_DECLARED: list[object] = []  # torch forgets a declaration when its Library object goes


@cache
def import_timm() -> ModuleType:
    """timm, with torchvision mended first where that is needed."""
    import_torchvision()
    return require("timm", "learn")


@cache
def import_torchvision() -> ModuleType:
    """torchvision, mended where that is needed."""
    if not _import_torchvision():
        raise MissingExtraError("this needs the 'learn' extra: pip install 'bioscan[learn]'")
    return require("torchvision", "learn")


@cache
def import_transformers() -> ModuleType:
    """transformers, with torchvision mended first where it is there; it needs none.

    Its progress bars, its advice and the hub's are silenced: they would go between our own lines.
    """
    _import_torchvision()
    transformers = require("transformers", "detect")
    require("scipy", "detect")  # matches queries to boxes
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    require("huggingface_hub", "detect").utils.logging.set_verbosity_error()
    return transformers


@cache
def _import_torchvision() -> bool:
    """Whether torchvision is there; mended where it does not load."""
    torch = require("torch", "learn")
    try:
        import torchvision
    except ModuleNotFoundError:
        return False
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(library)
        import torchvision  # noqa: F401
    return True
