"""How many windows are decoded side by side: a number, or "auto", which looks at the device.

Few on a CPU, where a larger batch saves little and costs memory; on a GPU as many as half of its
free memory holds, but no more than keep it busy. In sequential mode each is a window of a recording
of its own, which is open as long.
"""

from __future__ import annotations

from typing import Any

from whisper_flash_attention.errors import OptionError

ON_CPU = 4
MOST_ON_GPU = {"sequential": 32, "batched": 128}
PROMPT_TOKENS = 4
# Of memory that is free once the model is loaded.
SHARE_OF_FREE = 0.5


def parse_batch_size(text: str) -> int | None:
    """A number of windows, 1 or more; None for "auto".

    Raises:
        OptionError: it is neither.
    """
    if text.strip().lower() == "auto":
        return None
    if not text.strip().isdecimal() or int(text) < 1:
        raise OptionError(f"batch size is {text!r}: give a whole number, 1 or more, or auto")
    return int(text)


def automatic_batch_size(model: Any, mode: str, beams: int = 1) -> int:
    """Windows at a time for a model where it is now.

    Args:
        model: whose device, and whose `plan` if it has one, tell how many fit.
        mode: "sequential" or "batched".
        beams: per window.
    """
    if model.device.type != "cuda" or not hasattr(model, "plan"):
        return ON_CPU
    import torch

    held = sum(each.nbytes for each in model.parameters())
    free, _ = torch.cuda.mem_get_info(model.device)
    budget = (held + SHARE_OF_FREE * free) / 1e9
    try:
        plan = model.plan(
            memory_gb=budget,
            max_new_tokens=model.config.max_target_positions - PROMPT_TOKENS,
            prompt_tokens=PROMPT_TOKENS,
            num_beams=beams,
        )
    except OptionError:  # adapters or hooks, or hardly any memory is left
        return ON_CPU
    return int(max(1, min(plan.batch_size, MOST_ON_GPU[mode])))
