"""Open a checkpoint for transcription: model and processor, on a device, with clear errors."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from whisper_flash_attention.devices import resolve_device, resolve_dtype
from whisper_flash_attention.errors import OptionError, WeightsError
from whisper_flash_attention.validation import shown

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
        loaded: Any = WhisperFlashAttentionForConditionalGeneration.from_pretrained(
            checkpoint,
            attn_implementation=attention,
            dtype=precision,
            output_loading_info=True,
        )
        model, report = loaded
        check_complete(source, report)
        processor = load_processor(checkpoint)
    module: torch.nn.Module = model  # whose `to`, in place, has a signature that mypy can read
    module.to(target)
    return model, processor


def check_attention(name: str) -> None:
    """Raise `OptionError` if a name is neither one of our back-ends nor Transformers' own."""
    from whisper_flash_attention.flash_attention import backend_names

    known = (*backend_names(), *STOCK_ATTENTION)
    if not isinstance(name, str):
        raise OptionError(f"attention is {shown(name)}; possible: {', '.join(known)}")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise OptionError(
            f"unknown attention back-end {name!r}; {hint}possible: {', '.join(known)}"
        )


def check_complete(source: str, report: Mapping[str, Any]) -> None:
    """Raise `WeightsError` if a checkpoint left parameters at random values.

    Args:
        source: the checkpoint, for the message.
        report: what `from_pretrained(..., output_loading_info=True)` returns beside the model.
    """
    from whisper_flash_attention.weights.checkpoint import shorten

    missing = sorted(report["missing_keys"])
    layers = sorted(name for name in report["unexpected_keys"] if ".layers." in name)
    for names, what in ((missing, "lacks"), (layers, "has layers that its config.json lacks:")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise WeightsError(
                f"cannot load model {source!r}: its weights do not fit its config.json: the "
                f"checkpoint {what} {shorten(names[0])}{more}"
            )


@contextmanager
def explained(source: str) -> Iterator[None]:
    """Turn what Transformers and the Hub's client raise into one `WeightsError`."""
    from huggingface_hub.errors import RepositoryNotFoundError

    from whisper_flash_attention.weights.files import describe_error, third_party_parser

    def message(error: BaseException) -> str:
        if any(isinstance(cause, RepositoryNotFoundError) for cause in _causes(error)):
            reason = "the Hub has no such model, or it is private"
        else:
            reason = describe_error(error)
        return f"cannot load model {source!r}: {reason}; {_WHAT_TO_DO}"

    with third_party_parser(message):
        yield


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
