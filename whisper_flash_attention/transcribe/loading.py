"""Open a checkpoint for transcription, on the engine where it can run the model.

The engine needs no class of Transformers, whose import takes longer than loading a small model:
weights and tokenizer are read from their files. What only Transformers can read, and what runs on
it, is loaded as `WhisperFlashAttentionForConditionalGeneration`, and the log says why. At the end,
what warms a loaded model up.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from whisper_flash_attention import validation as check
from whisper_flash_attention.audio.audio_source import load_audio
from whisper_flash_attention.audio.bundled_clips import bundled_recordings
from whisper_flash_attention.audio.samples import SAMPLING_RATE, Samples
from whisper_flash_attention.devices import resolve_compute_type, resolve_device, set_threads
from whisper_flash_attention.errors import OptionError, WeightsError
from whisper_flash_attention.terminal import quiet_transformers
from whisper_flash_attention.transcribe.tokenizer import Vocabulary
from whisper_flash_attention.weights.hub import Hub

if TYPE_CHECKING:
    import torch
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    from whisper_flash_attention.engine.engine import Engine
    from whisper_flash_attention.weights.checkpoint import Checkpoint

STOCK_ATTENTION = ("eager", "sdpa")

_WHAT_TO_DO = (
    "give a model's short name (tiny.en, small, turbo, ...), a Hub id, a folder or an OpenAI .pt "
    "file; without a network, a local folder or package:tiny.en"
)

logger = logging.getLogger("whisper_flash_attention")


@dataclass(frozen=True)
class Source:
    """A checkpoint and where it runs, as `Transcriber.from_pretrained` takes them, checked.

    Args:
        name: as it was given; `checkpoint` is its Hub id where it is a short name.
        dtype: of activations, and of weights where `precision` is None.
        precision: in which `engine.packing` lays out the weights for a CPU: "float32", "int8", or
            "auto", that is int8 if the checkpoint holds that.
        attention: "auto", or what the model is to run on.
        quiet: whether Transformers and the Hub's client print nothing.
        hub: where repositories come from.

    Raises as `load`.
    """

    name: str
    checkpoint: str
    device: torch.device
    dtype: torch.dtype
    precision: str | None
    attention: str
    quiet: bool
    hub: Hub

    @classmethod
    def of(
        cls,
        name: str,
        *,
        device: str,
        compute_type: str,
        attention: str,
        quiet: bool,
        hub: Hub,
    ) -> Source:
        from whisper_flash_attention.weights import hub_id

        target = resolve_device(device)
        dtype, precision = resolve_compute_type(compute_type, target)
        checkpoint = hub_id(name)
        check_attention(attention)
        return cls(name, checkpoint, target, dtype, precision, attention, quiet, hub)

    def convert(self, tensor: torch.Tensor) -> torch.Tensor:
        """What becomes of a tensor of the file: nothing where `packing` converts it."""
        return tensor.to(self.device, self.dtype) if self.precision is None else tensor

    def precision_for(self, checkpoint: Checkpoint) -> str | None:
        """The precision in which the weights of a checkpoint are laid out, if they are."""
        if self.precision == "auto":
            return "int8" if checkpoint.is_int8 else "float32"
        return self.precision

    def silence(self, *packages: str) -> AbstractContextManager[None]:
        """Keep these packages from printing, if that is wanted."""
        if not self.quiet:
            return nullcontext()
        for name in packages:
            import_module(name)
        return quiet_transformers()


@dataclass(frozen=True)
class EngineModel:
    """A model that exists as weights of an engine alone.

    Attributes:
        source: from which Transformers can load it, too.
        tokenizer: `weights.tokenizer.Tokenizer`.
        alignment_heads: (layer, head) pairs for word timestamps; None if the checkpoint names none.
    """

    source: Source
    engine: Engine
    vocabulary: Vocabulary
    tokenizer: Any
    alignment_heads: Any


def load(
    source: str,
    *,
    device: str = "auto",
    compute_type: str = "auto",
    threads: int | None = None,
    attention: str = "auto",
    quiet: bool = False,
    download_root: str | None = None,
    local_files_only: bool = False,
) -> tuple[WhisperForConditionalGeneration | EngineModel, WhisperProcessor | None]:
    """Load the arguments of `Transcriber`: those of the engine where it can run the model.

    Args are those of `Transcriber.from_pretrained`, errors too.

    Args:
        quiet: have Transformers and the Hub's client print nothing.
    """
    if threads is not None:
        set_threads(threads)
    checked = Source.of(
        source,
        device=device,
        compute_type=compute_type,
        attention=attention,
        quiet=quiet,
        hub=Hub(download_root, local_files_only),
    )
    found = load_engine(checked)
    if isinstance(found, EngineModel):
        return found, None
    if checked.precision == "int8":
        raise OptionError(f'compute_type="int8" needs the engine, which cannot run this: {found}')
    logger.info("%s is loaded with Transformers: %s", source, found)
    return load_model(checked), load_processor(checked)


def load_engine(source: Source) -> EngineModel | str:
    """Load what the engine needs, or say why the model must run on Transformers."""
    if source.attention != "auto":
        return f"the attention back-end {source.attention!r} was requested by name"
    from whisper_flash_attention.engine.engine import Engine
    from whisper_flash_attention.engine.packing import pack
    from whisper_flash_attention.engine.weights import HEAD_WIDTH, weights_of
    from whisper_flash_attention.weights.model_files import read_model
    from whisper_flash_attention.weights.sources import locate

    with explained(source.name):
        is_remote = locate(source.checkpoint).folder is None
        with source.silence(*(["huggingface_hub"] if is_remote else [])):
            files = read_model(source.checkpoint, source.convert, source.hub)
    if isinstance(files, str):
        return files
    sizes = files.checkpoint.dimensions
    heads = {sizes.encoder_attention_heads, sizes.decoder_attention_heads}
    if heads != {sizes.d_model // HEAD_WIDTH} or sizes.d_model % HEAD_WIDTH:
        return f"its attention heads have not {HEAD_WIDTH} values"
    generation = SimpleNamespace(**files.checkpoint.generation)
    check_features(SimpleNamespace(**files.features), sizes.num_mel_bins)
    precision = source.precision_for(files.checkpoint)
    weights = weights_of(
        files.checkpoint.state_dict,
        encoder_heads=sizes.encoder_attention_heads,
        decoder_heads=sizes.decoder_attention_heads,
    )
    return EngineModel(
        source=source,
        engine=Engine(weights if precision is None else pack(weights, precision)),
        vocabulary=Vocabulary.of(sizes, generation),
        tokenizer=files.tokenizer,
        alignment_heads=getattr(generation, "alignment_heads", None),
    )


def load_model(source: Source) -> WhisperForConditionalGeneration:
    """Load the model in evaluation mode, as an object of Transformers."""
    from whisper_flash_attention.modeling_whisper_flash_attention import (
        WhisperFlashAttentionForConditionalGeneration,
    )

    with explained(source.name), source.silence("transformers"):
        loaded: Any = WhisperFlashAttentionForConditionalGeneration.from_pretrained(
            source.checkpoint,
            attn_implementation=source.attention,
            dtype=source.dtype,
            output_loading_info=True,
            cache_dir=source.hub.folder,
            local_files_only=source.hub.local_files_only,
        )
    model, report = loaded
    check_complete(source.name, report)
    module: torch.nn.Module = model  # whose `to`, in place, has a signature that mypy can read
    module.to(source.device)
    whisper: WhisperForConditionalGeneration = model
    return whisper


def load_processor(source: Source) -> WhisperProcessor:
    """Load the processor, as an object of Transformers."""
    from whisper_flash_attention.weights import load_processor

    with explained(source.name), source.silence("transformers"):
        return load_processor(source.checkpoint)


def check_features(extractor: Any, mel_bins: int) -> None:
    """Raise `WeightsError` if a checkpoint was trained on features that `log_mel` does not give."""
    from whisper_flash_attention.weights.model_files import FEATURES

    for name, value in FEATURES.items():
        found = getattr(extractor, name)
        if found != value and name != "feature_size":
            raise WeightsError(
                f"the checkpoint's preprocessor_config.json has {name} {found!r}, but Whisper's "
                f"features have {value!r}: transcribe with Transformers' own pipeline"
            )
    if extractor.feature_size != mel_bins:
        raise WeightsError(
            f"the checkpoint's preprocessor_config.json has feature_size "
            f"{extractor.feature_size!r}, but its model takes {mel_bins} mel bins: they do not "
            "belong together"
        )


def check_attention(name: str) -> None:
    """Raise `OptionError` if a name is neither one of our back-ends nor Transformers' own."""
    from whisper_flash_attention.flash_attention import backend_names

    known = (*backend_names(), *STOCK_ATTENTION)
    check.one_of("attention", name, known)


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
    from whisper_flash_attention.weights.files import describe_error, third_party_parser

    def message(error: BaseException) -> str:
        from huggingface_hub.errors import RepositoryNotFoundError

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


# What a first call takes that later ones do not: compiling kernels, recording graphs, buffers.


def warm_up_calls(batch_size: int) -> Iterator[list[Samples]]:
    """Recordings of real speech for calls that meet the shapes of a batch size.

    A full batch, its halves down to one, and one more than a batch, which has a rest.
    """
    speech = load_audio(bundled_recordings()[0].path)
    speech = np.resize(speech, 20 * SAMPLING_RATE)
    counts = {batch_size + 1}
    while batch_size > 1:
        counts.add(batch_size)
        batch_size = (batch_size + 1) // 2
    for count in sorted(counts | {1}, reverse=True):
        yield [speech] * count


def announce_compilation(device_type: str) -> None:
    """Say once that kernels are compiled, where none of an earlier run are kept."""
    if device_type != "cuda" or _kernels_are_kept():
        return
    logger.warning(
        "first use on this machine: kernels for the GPU are compiled, which takes up to some "
        "minutes; they are kept in %s",
        _folder(),
    )


def _folder() -> Path:
    from triton import knobs

    return Path(knobs.cache.dir)


def _kernels_are_kept() -> bool:
    folder = _folder()
    return folder.is_dir() and any(folder.iterdir())
