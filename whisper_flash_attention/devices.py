"""Devices and dtypes by name. PyTorch is imported where it is used, so that `--help` is quick."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from whisper_flash_attention import validation as check
from whisper_flash_attention.errors import DeviceError, OptionError
from whisper_flash_attention.options import COMPUTE_TYPES, DTYPES, MOST_THREADS, ModelOptions

if TYPE_CHECKING:
    import torch


def resolve_device(name: str = "auto") -> torch.device:
    """Return the device of this name: "auto", "cpu", "cuda", "cuda:N" or "mps".

    "auto" is the first CUDA GPU where PyTorch sees one, else the CPU.

    Raises:
        OptionError: the name is none of these.
        DeviceError: there is no such device here; says what there is.
    """
    import torch

    known = isinstance(name, str)
    match = re.fullmatch(r"auto|cpu|mps|cuda(?::([0-9]{1,9}))?", name) if known else None
    if match is None:
        raise OptionError(
            f"device is {check.shown(name)}: give auto, cpu, cuda, cuda:N (the GPU's number) or mps"
        )
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise DeviceError('device="mps" was requested, but PyTorch finds no Apple GPU; use "cpu"')
    if name.startswith("cuda"):
        _check_cuda(name, index=int(match[1] or 0))
    return torch.device(name)


def device_and_dtype(options: ModelOptions) -> tuple[torch.device, str]:
    """Return the device of a model, and the name of its dtype, as `resolve_dtype` finds them."""
    device = resolve_device(options.device)
    return device, str(resolve_dtype(options.compute_type, device)).removeprefix("torch.")


def _check_cuda(name: str, index: int) -> None:
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        raise DeviceError(
            f'device="{name}" was requested, but this PyTorch ({torch.__version__}) is built for '
            "CPUs only; use 'cpu', or install a CUDA build (pytorch.org)"
        )
    count = torch.cuda.device_count()
    if count == 0:
        raise DeviceError(
            f"device=\"{name}\" was requested, but PyTorch finds no GPU; use 'cpu', or see "
            "whether `nvidia-smi` runs"
        )
    if index >= count:
        found = ", ".join(f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(count))
        raise DeviceError(f'device="{name}" was requested; found: {found}')


def set_threads(count: int) -> None:
    """Have PyTorch compute with that many threads on the CPU, in the whole process.

    Raises `OptionError` unless it is a whole number from 1 on.
    """
    import torch

    torch.set_num_threads(check.whole_number("threads", count, least=1, most=MOST_THREADS))


def resolve_compute_type(name: str, device: torch.device) -> tuple[torch.dtype, str | None]:
    """Return the dtype of activations, and in which precision weights are laid out for a CPU.

    The precision is "float32", "int8" or "auto" (what the checkpoint holds of these); None where
    weights have the dtype of activations.

    Raises `OptionError` if the name is not one of `COMPUTE_TYPES`, or int8 cannot run there.
    """
    import torch

    check.one_of("compute_type", name, COMPUTE_TYPES)
    if name == "int8" and device.type != "cpu":
        raise OptionError(
            f'compute_type="int8" runs on CPUs, and the device is {str(device)!r}: give float16'
        )
    if device.type == "cpu" and name in ("auto", "float32", "int8"):
        return torch.float32, name
    return resolve_dtype(name, device), None


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of this name: "auto" is float16 on a CUDA GPU and float32 elsewhere.

    Raises `OptionError` if the name is not one of `DTYPES`.
    """
    import torch

    if name == "int8":
        raise OptionError(
            'compute_type="int8" is for transcription on a CPU; this runs models of Transformers '
            f"or compares with them: give {check.alternatives(DTYPES)}; `whisper-flash benchmark "
            "peers --dtype int8` measures speed and word errors of int8"
        )
    check.one_of("dtype", name, DTYPES)
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype
