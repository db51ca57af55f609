"""Files of a repository on the Hub, from the cache of its client or downloaded by it.

A Hub that does not reply is noticed with one short request; the client alone would try each file
for minutes.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from whisper_flash_attention.errors import WeightsError
from whisper_flash_attention.terminal import ANNOUNCEMENT

# Seconds for the Hub to reply.
PATIENCE = 5.0
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

logger = logging.getLogger("whisper_flash_attention")


@dataclass(frozen=True, slots=True)
class Hub:
    """Where files come from.

    Args:
        folder: of the cache; None is that of the Hub's client.
        local_files_only: take what is in the cache, and ask nobody.
    """

    folder: str | None = None
    local_files_only: bool = False

    def repository_folder(self, name: str, *, weights: bool = True) -> Path:
        """A local folder with the files of a repository that this package reads.

        Args:
            name: a Hub id.
            weights: whether its weights are needed.

        Raises:
            WeightsError: the Hub cannot be reached, and the cache lacks the repository.

        What the client of the Hub raises passes.
        """
        from huggingface_hub import snapshot_download

        groups = (_DESCRIPTIONS, *(_WEIGHTS if weights else ()))
        missing = None if self.local_files_only else self._missing_bytes(name, groups)

        def download(patterns: tuple[str, ...]) -> Path:
            return Path(
                snapshot_download(
                    name,
                    allow_patterns=list(patterns),
                    cache_dir=self.folder,
                    local_files_only=missing is None,
                    tqdm_class=_bar() if missing else None,
                )
            )

        folder = download(_DESCRIPTIONS)
        for patterns in groups[1:]:
            if not (folder / patterns[0]).exists():
                folder = download(patterns)
            if (folder / patterns[0]).exists():
                break
        return folder

    def _missing_bytes(self, name: str, groups: tuple[tuple[str, ...], ...]) -> int | None:
        """The size of what will be downloaded, announced; None if the cache must do."""
        from huggingface_hub import HfApi, constants, try_to_load_from_cache
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        if constants.HF_HUB_OFFLINE:
            return 0  # the client knows
        try:
            info = HfApi().model_info(name, files_metadata=True, timeout=PATIENCE)
        except (HfHubHTTPError, HFValidationError):  # the Hub replied, or need not
            raise
        # What else it raises is of its HTTP library, which differs between releases.
        except Exception as error:
            reason = f"{constants.ENDPOINT} cannot be reached ({error or type(error).__name__})"
            if isinstance(try_to_load_from_cache(name, "config.json", self.folder), str):
                logger.warning("%s; %s is taken from the cache", reason, name)
                return None
            raise WeightsError(
                f"cannot load model {name!r}: {reason}; without a network, give a local folder or "
                "package:tiny.en"
            ) from error
        missing = sum(
            file.size or 0
            for file in _wanted(info.siblings or [], groups)
            if not isinstance(try_to_load_from_cache(name, file.rfilename, self.folder), str)
        )
        if missing:
            logger.log(ANNOUNCEMENT, "downloading %s: %.0f MB", name, missing / 1e6)
        return missing


def _bar() -> Any:
    """A class of progress bars for a terminal, whatever the client's are set to."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": not sys.stderr.isatty()})

    return Bar


def _wanted(files: list[Any], groups: tuple[tuple[str, ...], ...]) -> list[Any]:
    """The files of a repository that describe it, and its first kind of weights."""
    found: list[Any] = []
    for number, patterns in enumerate(groups):
        names = [file.rfilename for file in files]
        if number and patterns[0] not in names:
            continue
        found += [file for file in files if any(fnmatch(file.rfilename, each) for each in patterns)]
        if number:
            break
    return found
