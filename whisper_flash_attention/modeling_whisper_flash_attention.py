"""`WhisperFlashAttentionForConditionalGeneration`, the only Transformers model class here.

It is stock Whisper, module by module and parameter by parameter, with three changes: the
attention function (a back-end of `flash_attention/`, by name), the loop that `generate` runs (the
decode engine; Transformers' own, with our caches, for what the engine does not do), and the files
that `from_pretrained` reads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig, WhisperConfig

from whisper_flash_attention import validation as check
from whisper_flash_attention.engine.engine import Engine
from whisper_flash_attention.engine.memory_plan import MemoryPlan, PlanRequest, make_plan
from whisper_flash_attention.engine.request import CROSS_ATTENTION
from whisper_flash_attention.engine.weights import collect_weights
from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.flash_attention import backend_names
from whisper_flash_attention.hf import compat, decode_hooks, eligibility, fast_path, stock_modules
from whisper_flash_attention.hf.attention_registry import (
    from_transformers_name,
    register_backends,
    to_transformers_name,
)
from whisper_flash_attention.hf.compat import GenerationMode, StockWhisper
from whisper_flash_attention.hf.fallback import Fallback
from whisper_flash_attention.hf.kv_cache import new_cache
from whisper_flash_attention.weights import read_checkpoint
from whisper_flash_attention.weights.checkpoint import check_limits
from whisper_flash_attention.weights.transformers_folder import check_folder

STOCK_ARCHITECTURE = StockWhisper.__name__


class WhisperFlashAttentionForConditionalGeneration(StockWhisper):
    """Whisper with memory-efficient attention; a drop-in for `WhisperForConditionalGeneration`.

    Everything that the stock class does works here by the same names; a call of `generate`
    runs on this package's decode engine where it can (with attention "auto"), else on Transformers'
    own loop; the logger `whisper_flash_attention` logs the reason. In a dictionary that `generate`
    returns, the key/value cache is computed on first access.

    Five things are new:

    - `attn_implementation` also accepts the back-ends of this package: "auto" (the default: the
      first that can run the call), "reference", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient",
      "xformers", "flash_attn". A back-end requested by name never falls back to another.
    - `from_pretrained` also reads OpenAI's `.pt` files and faster-whisper (CTranslate2) folders.
    - `cross_attention` selects what the engine's cross-attention reads.
    - `plan` computes the memory of a call before it is made, or the batch that fits a budget.
    - `release` gives back the memory that is kept between calls.

    Calls from several threads are safe: they run one after another.

    Args:
        config: a `WhisperConfig`; weights are random, as in the stock class.

    Raises:
        IncompatibleTransformers: the installed Transformers lacks an internal that is used here.
        WeightsError: a dimension is many times that of any Whisper.
        ValueError: `config._attn_implementation` names no attention implementation.
    """

    _cross_attention = "auto"

    def __init__(self, config: WhisperConfig) -> None:
        compat.check()
        check_limits("the configuration", config)
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
            OSError: Transformers could not find or load a Hub id or folder. What else it raises
                for a file of a folder (RuntimeError for weights of another shape) passes, too.
        """
        source = pretrained_model_name_or_path
        checkpoint = None if source is None else read_checkpoint(source)
        if checkpoint is None:
            if source is not None:
                source = os.path.expanduser(source)
                _check_folder(Path(source), kwargs)
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
        # The stock method writes the name of this class, which other programs cannot load.
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

    @property
    def cross_attention(self) -> str:
        """What the engine's cross-attention reads: "auto", "projected" or "absorbed".

        "projected": keys and values, projected once per clip and layer. "absorbed": the encoder's
        output itself, with the projections moved to the queries; less memory and fewer bytes per
        step. "auto" (the default) chooses by batch and model size.

        Setting it to anything else raises `OptionError`.
        """
        return self._cross_attention

    @cross_attention.setter
    def cross_attention(self, value: str) -> None:
        self._cross_attention = check.one_of("cross_attention", value, CROSS_ATTENTION)

    def plan(
        self,
        *,
        batch_size: int | None = None,
        memory_gb: float | None = None,
        max_new_tokens: int = 256,
        prompt_tokens: int = 4,
        num_beams: int = 1,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> MemoryPlan:
        """Compute the memory that `generate` will need.

            print(model.plan(batch_size=32, max_new_tokens=256))      # of 32 clips
            model.plan(memory_gb=8, max_new_tokens=256).batch_size    # the clips that fit 8 GB

        Args:
            batch_size: clips per call; or else
            memory_gb: a budget in units of 1e9 bytes, weights included: plan the most clips that
                fit.
            max_new_tokens, prompt_tokens, num_beams: of every clip.
            device, dtype: default to the model's. A GPU need not be present, and the model may be
                on the meta device, without weights.

        Returns:
            A `MemoryPlan`; its `total` is the allocator's peak in bytes, and its `driver` what the
            driver will count for the process, on a GPU that is present.

        Raises:
            OptionError: not exactly one of `batch_size` and `memory_gb`, a number out of range, a
                budget too small for one clip, or a model that the engine cannot run.
        """
        reason = stock_modules.mismatch(self, without_data=True)
        if reason is not None:
            raise OptionError(f"the engine cannot run this model: {reason}")
        wanted = PlanRequest(
            max_new_tokens=max_new_tokens,
            prompt_tokens=prompt_tokens,
            num_beams=num_beams,
            cross_attention=self.cross_attention,
            device=self.device if device is None else torch.device(device),
            dtype=self.dtype if dtype is None else dtype,
        )
        return make_plan(collect_weights(self), wanted, batch_size=batch_size, memory_gb=memory_gb)

    def release(self) -> None:
        """Give back the device memory that is kept between calls of `generate`, but not the model.

        Buffers and recorded graphs of the largest call so far are kept for the next one, which
        makes them anew after this. PyTorch's allocator gives back what it holds free.
        """
        Engine.release_of(self)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Stock `generate`, with all its options; the attention back-end is kept.

        Stock Whisper switches to eager attention for word timestamps and never switches back.

        Raises:
            NotFinite: the model computed NaN or infinity.
        """

        def stock() -> Any:
            with self._attention_kept():
                return super(WhisperFlashAttentionForConditionalGeneration, self).generate(
                    *args, **kwargs
                )

        return fast_path.generate(self, stock, args, kwargs)

    def detect_language(
        self,
        input_features: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        generation_config: GenerationConfig | None = None,
        num_segment_frames: int = 3000,
    ) -> torch.Tensor:
        """The language's token of every clip, int64 `[B]`; arguments are the stock method's."""
        if input_features is not None and encoder_outputs is None:
            features = input_features[:, :, :num_segment_frames]
            encoded = decode_hooks.encode(
                self, features, {}, generation_config or self.generation_config
            )
            if encoded is not None:
                input_features, encoder_outputs = None, encoded
        detected = super().detect_language(
            input_features=input_features,
            encoder_outputs=encoder_outputs,
            generation_config=generation_config,
            num_segment_frames=num_segment_frames,
        )
        decode_hooks.record_languages(detected)
        return detected

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Decode greedily or by sampling, on the engine where it can."""
        arguments = (input_ids, logits_processor, stopping_criteria, generation_config)
        call = eligibility.DecodeCall(*arguments, synced_gpus, streamer, model_kwargs)
        result = decode_hooks.decode(self, call)
        if not isinstance(result, Fallback):
            return result
        parent: Any = super()
        return parent._sample(
            *arguments, synced_gpus=synced_gpus, streamer=streamer, **model_kwargs
        )

    def _beam_search(
        self,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """Decode by beam search, on the engine where it can."""
        arguments = (input_ids, logits_processor, stopping_criteria, generation_config)
        call = eligibility.DecodeCall(*arguments, synced_gpus, None, model_kwargs, by_beams=True)
        result = decode_hooks.decode(self, call)
        if not isinstance(result, Fallback):
            return result
        parent: Any = super()
        return parent._beam_search(*arguments, synced_gpus=synced_gpus, **model_kwargs)

    def _prepare_text_encoder_decoder_kwargs_for_generation(
        self,
        inputs_tensor: torch.Tensor,
        model_kwargs: dict[str, Any],
        model_input_name: str | None,
        generation_config: GenerationConfig,
    ) -> dict[str, Any]:
        """Run the encoder for `generate`, on the engine where it can."""
        encoded = None
        if model_input_name == self.main_input_name:
            encoded = decode_hooks.encode(self, inputs_tensor, model_kwargs, generation_config)
        if encoded is not None:
            return model_kwargs | {"encoder_outputs": encoded}
        parent: Any = super()
        step = next(getattr(parent, name) for name in compat.ENCODER_STEPS if hasattr(parent, name))
        prepared: dict[str, Any] = step(
            inputs_tensor, model_kwargs, model_input_name, generation_config
        )
        return prepared

    # Its name in Transformers before 5.23.
    _prepare_encoder_decoder_kwargs_for_generation = (
        _prepare_text_encoder_decoder_kwargs_for_generation
    )

    def _postprocess_outputs(self, *args: Any, **kwargs: Any) -> Any:
        return decode_hooks.postprocess_outputs(super()._postprocess_outputs, *args, **kwargs)

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
        """Replace the default caches of `generate` by ours."""
        given = model_kwargs.get(compat.CACHE)
        parent: Any = super()
        is_prepared: bool = parent._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        made = model_kwargs.get(compat.CACHE)
        is_default = (
            given is None
            and generation_config.cache_implementation in (None, "dynamic")
            and not getattr(generation_config, "is_assistant", False)
            and isinstance(made, EncoderDecoderCache)
            and type(made.self_attention_cache) is DynamicCache
        )
        if is_default:
            model_kwargs[compat.CACHE] = new_cache()
        return is_prepared


def _check_folder(folder: Path, options: dict[str, Any]) -> None:
    """Check what `from_pretrained` will read from a folder; skip Hub ids."""
    if not folder.is_dir() or options.get("gguf_file"):
        return
    config = options.get("config")
    check_folder(
        folder / (options.get("subfolder") or ""),
        variant=options.get("variant"),
        safetensors=options.get("use_safetensors") is not False,
        config=not isinstance(config, WhisperConfig),
        weights=options.get("state_dict") is None,
    )
