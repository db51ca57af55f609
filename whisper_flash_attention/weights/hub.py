"""Files of a repository on the Hub, from the cache of its client or downloaded by it."""

from __future__ import annotations

from pathlib import Path

# What describes a model and its processor; `tokenizer.json` makes older files of it superfluous.
_DESCRIPTIONS = (
    *("config.json", "generation_config.json", "adapter_config.json"),
    *("preprocessor_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
# Names of weight files, in the order in which Transformers takes them.
_WEIGHTS = (
    ("model.safetensors",),
    ("model.safetensors.index.json", "model-*-of-*.safetensors"),
    ("pytorch_model.bin",),
    ("pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"),
)


def repository_folder(name: str, *, weights: bool = True) -> Path:
    """A local folder with the files of a repository that this package reads.

    Args:
        name: a Hub id.
        weights: whether its weights are needed.

    Raises what the client of the Hub raises.
    """
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(name, allow_patterns=list(_DESCRIPTIONS)))
    for patterns in _WEIGHTS if weights else ():
        if not (folder / patterns[0]).exists():
            folder = Path(snapshot_download(name, allow_patterns=list(patterns)))
        if (folder / patterns[0]).exists():
            break
    return folder
