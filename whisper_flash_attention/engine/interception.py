"""What intercepts PyTorch's operations: it would see the engine's instead of a model's."""

from __future__ import annotations

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext


def intercepted_by(device: torch.device) -> str | None:
    """What changes or intercepts operations on this device in this thread, in words."""
    return "autocast" if torch.is_autocast_enabled(device.type) else operation_mode()


def operation_mode() -> str | None:
    """The mode or transform that intercepts operations in this thread, in words."""
    # A default device is a mode, too, but changes no operation on existing tensors.
    stack = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    modes = [mode for mode in stack if type(mode) is not DeviceContext]
    if modes:
        return type(modes[-1]).__name__
    if torch._C._len_torch_dispatch_stack():
        return "a TorchDispatchMode"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func"
    return None
