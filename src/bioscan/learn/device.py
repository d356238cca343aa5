"""Where networks compute, and in which number type."""

import contextlib

import torch

from bioscan.errors import RequestError


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device asked for, or the best there is.

    Args:
        name: `auto`, `cpu`, `cuda` or `mps`.
        local_rank: Of several processes on a machine, each takes a GPU of its own by its number.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise RequestError("no CUDA device here; pass --device cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise RequestError("no MPS device here; pass --device cpu")
    if name == "cuda" and local_rank:  # a scheduler may show each process its own GPU only
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return torch.device(name)


def choose_precision(amp: str, device: torch.device) -> torch.dtype | None:
    """The 16-bit type to compute in, None for float32."""
    if amp == "bf16":
        return torch.bfloat16
    if amp == "fp16":
        if device.type != "cuda":
            raise RequestError(f"fp16 needs a CUDA device, this is {device.type}; use --amp auto")
        return torch.float16
    if amp == "auto" and device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if amp == "auto" and device.type == "cpu" and _cpu_has_bf16():
        return torch.bfloat16  # elsewhere bf16 is emulated and slower
    return None


def precision_name(amp: str, device: torch.device) -> str:
    """`float32`, `bfloat16` or `float16`, for the record."""
    return str(choose_precision(amp, device) or torch.float32).removeprefix("torch.")


def _cpu_has_bf16() -> bool:
    asked = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # not in the oldest torch that we take
    return asked is not None and bool(asked())


def autocast(
    device: torch.device, precision: torch.dtype | None
) -> contextlib.AbstractContextManager[object]:
    """Mixed precision, or nothing at all for None."""
    return contextlib.nullcontext() if precision is None else torch.autocast(device.type, precision)
