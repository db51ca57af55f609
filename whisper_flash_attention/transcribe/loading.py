"""Open a checkpoint for transcription: model and processor, on a device, with clear errors."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from whisper_flash_attention.config import resolve_device, resolve_dtype
from whisper_flash_attention.errors import OptionError, WeightsError, WhisperFlashError

if TYPE_CHECKING:
    import torch
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

STOCK_ATTENTION = ("eager", "sdpa")

_WHAT_TO_DO = (
    "give a model's short name (tiny.en, small, turbo, ...), a Hub id, a folder or an OpenAI .pt "
    "file; without a network, a local folder or package:tiny.en"
)


def load(
    source: str, *, device: str = "auto", dtype: str = "auto", attention: str = "auto"
) -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """Load the model (in evaluation mode) and the processor of `source`.

    Args are those of `Transcriber.from_pretrained`, errors too.
    """
    from whisper_flash_attention.modeling_whisper_flash_attention import (
        WhisperFlashAttentionForConditionalGeneration,
    )
    from whisper_flash_attention.weights import hub_id, load_processor

    target = resolve_device(device)
    precision = resolve_dtype(dtype, target)
    checkpoint = hub_id(source)
    check_attention(attention)
    with explained(source):
        model = WhisperFlashAttentionForConditionalGeneration.from_pretrained(
            checkpoint, attn_implementation=attention, dtype=precision
        )
        processor = load_processor(checkpoint)
    module: torch.nn.Module = model  # whose `to`, in place, has a signature that mypy can read
    module.to(target)
    return model, processor


def check_attention(name: str) -> None:
    """Raise `OptionError` if a name is neither one of our back-ends nor Transformers' own."""
    from whisper_flash_attention.flash_attention import backend_names

    known = (*backend_names(), *STOCK_ATTENTION)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise OptionError(
            f"unknown attention back-end {name!r}; {hint}possible: {', '.join(known)}"
        )


@contextmanager
def explained(source: str) -> Iterator[None]:
    """Turn what Transformers and the Hub's client raise into one `WeightsError`."""
    from huggingface_hub.errors import RepositoryNotFoundError
    from safetensors import SafetensorError

    try:
        yield
    except WhisperFlashError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        if any(isinstance(cause, RepositoryNotFoundError) for cause in _causes(error)):
            reason = "the Hub has no such model, or it is private"
        else:
            reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise WeightsError(f"cannot load model {source!r}: {reason}; {_WHAT_TO_DO}") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
