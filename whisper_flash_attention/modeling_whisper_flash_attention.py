"""`WhisperFlashAttentionForConditionalGeneration`, the only Transformers model class here.

It is stock Whisper, module by module and parameter by parameter, with three things changed: the
attention function (a back-end of `flash_attention/`, by name), the caches that `generate` fills,
and the files that `from_pretrained` reads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig, WhisperConfig
from transformers import WhisperForConditionalGeneration as StockWhisper

from whisper_flash_attention import compat
from whisper_flash_attention.cache import new_cache
from whisper_flash_attention.compat import GenerationMode
from whisper_flash_attention.flash_attention import (
    backend_names,
    from_transformers_name,
    register_backends,
    to_transformers_name,
)
from whisper_flash_attention.weights import read_checkpoint

STOCK_ARCHITECTURE = StockWhisper.__name__


class WhisperFlashAttentionForConditionalGeneration(StockWhisper):
    """Whisper with memory-efficient attention; a drop-in for `WhisperForConditionalGeneration`.

    Everything that the stock class does works here by the same names. Two things are new:

    - `attn_implementation` also takes the back-ends of this package: "auto" (the default: the
      first that can run the call), "reference", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient",
      "xformers", "flash_attn". A back-end asked for by name never falls back to another.
    - `from_pretrained` also reads OpenAI's `.pt` files and faster-whisper (CTranslate2) folders.

    Args:
        config: a `WhisperConfig`; weights are random, as in the stock class.

    Raises:
        IncompatibleTransformers: the installed Transformers lacks something we lean on.
        ValueError: `config._attn_implementation` names no attention implementation.
    """

    def __init__(self, config: WhisperConfig) -> None:
        compat.check()
        register_backends()
        super().__init__(config)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *model_args: Any,
        **kwargs: Any,
    ) -> Self:
        """Load weights from wherever they are.

        Args:
            pretrained_model_name_or_path: a Hub id, a Transformers folder, an OpenAI `.pt` file,
                a faster-whisper (CTranslate2) folder, or `package:tiny.en` for the weights that
                an installed Python package carries.
            **kwargs: as in the stock class (`dtype`, `device_map`, `attn_implementation`, ...).
                Converted checkpoints load as float32 unless `dtype` is given; "auto" keeps the
                dtype of the file.

        Raises:
            WeightsError: the file or folder is missing, truncated, wrong or hostile.
            OSError: Transformers could not find or load a Hub id or folder.
        """
        source = pretrained_model_name_or_path
        checkpoint = None if source is None else read_checkpoint(os.fspath(source))
        if checkpoint is None:
            return super().from_pretrained(source, *model_args, **kwargs)
        kwargs.setdefault("config", checkpoint.config)
        kwargs.setdefault("dtype", kwargs.pop("torch_dtype", torch.float32))
        generation_config = kwargs.pop("generation_config", None) or checkpoint.generation_config
        model = super().from_pretrained(
            None, *model_args, state_dict=checkpoint.state_dict, **kwargs
        )
        loaded = model[0] if isinstance(model, tuple) else model
        loaded.generation_config = generation_config
        loaded.config.name_or_path = str(source)
        return model

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> None:
        """Save as stock Whisper: the folder loads in `WhisperForConditionalGeneration` and here.

        Arguments are the stock method's. With `push_to_hub=True` the folder is written first and
        uploaded afterwards.
        """
        push_to_hub = kwargs.pop("push_to_hub", False)
        hub_options = {
            name: kwargs.pop(name)
            for name in ("repo_id", "commit_message", "create_pr")
            if name in kwargs
        }
        super().save_pretrained(save_directory, *args, **kwargs)
        # The stock method writes the name of this class, which other programs do not know.
        self.config.architectures = [STOCK_ARCHITECTURE]
        if (Path(save_directory) / "config.json").is_file():
            self.config.save_pretrained(save_directory)
        if push_to_hub:
            hub_options.setdefault("repo_id", Path(save_directory).name)
            self.push_to_hub(**hub_options)

    @property
    def attention_backend(self) -> str:
        """The attention in use: a back-end of this package, or one of Transformers' own."""
        name: str = self.config._attn_implementation
        return from_transformers_name(name) or name

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Stock `generate`, with all its options; the attention back-end outlives the call.

        Stock Whisper switches to eager attention for word timestamps and never switches back.
        """
        with self._attention_kept():
            return super().generate(*args, **kwargs)

    @contextmanager
    def _attention_kept(self) -> Iterator[None]:
        chosen = self.config._attn_implementation
        try:
            yield
        finally:
            if self.config._attn_implementation != chosen:
                self.config._attn_implementation = chosen

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, *args: Any, **kwargs: Any
    ) -> str:
        """Translate our back-ends' names; leave every other name to Transformers."""
        name = "auto" if attn_implementation is None else attn_implementation
        if name in backend_names():
            return to_transformers_name(name)
        return super()._check_and_adjust_attn_implementation(name, *args, **kwargs)

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> bool:
        """Give `generate` our caches wherever it would have made its default ones."""
        given = model_kwargs.get("past_key_values")
        parent: Any = super()
        answer: bool = parent._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        made = model_kwargs.get("past_key_values")
        is_default = (
            given is None
            and generation_config.cache_implementation in (None, "dynamic")
            and not getattr(generation_config, "is_assistant", False)
            and isinstance(made, EncoderDecoderCache)
            and type(made.self_attention_cache) is DynamicCache
        )
        if is_default:
            model_kwargs["past_key_values"] = new_cache()
        return answer
