"""What can be measured: model sizes, settings, rows, and the jobs that a command line selects.

Everything here is a frozen dataclass that is validated when made. A `Job` is one row of the
results: one system on one model at one setting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from whisper_flash_attention import validation as check
from whisper_flash_attention.errors import OptionError

ENCODER_FRAMES = 3000
ENCODER_POSITIONS = 1500
DECODER_POSITIONS = 448
PROMPT_TOKENS = 4  # <|startoftranscript|> <|en|> <|transcribe|> <|notimestamps|>
DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class ModelSize:
    """The dimensions of a published checkpoint, as in its `config.json`."""

    d_model: int
    heads: int
    encoder_layers: int
    decoder_layers: int
    ffn: int
    mel_bins: int = 80
    vocabulary: int = 51865

    def parameters(self, decoder_layers: int) -> int:
        """Count the weights of a model with this many decoder layers; tied ones count once."""
        d, f = self.d_model, self.ffn
        attention = 4 * d * d + 3 * d  # k_proj has no bias
        feed_forward = 2 * d * f + d + f
        norm = 2 * d
        convolutions = 3 * self.mel_bins * d + d + 3 * d * d + d
        encoder_layer = attention + feed_forward + 2 * norm
        decoder_layer = 2 * attention + feed_forward + 3 * norm
        embeddings = (ENCODER_POSITIONS + DECODER_POSITIONS + self.vocabulary) * d
        layers = self.encoder_layers * encoder_layer + decoder_layers * decoder_layer
        return convolutions + embeddings + layers + 2 * norm


@dataclass(frozen=True)
class Setting:
    """The work of a row: clips per call, tokens per clip, timed calls."""

    name: str
    batch_size: int
    new_tokens: int
    batches: int

    def __post_init__(self) -> None:
        for name, value in (("batch_size", self.batch_size), ("batches", self.batches)):
            check.whole_number(name, value, least=1)
        most = DECODER_POSITIONS - PROMPT_TOKENS
        check.whole_number("new_tokens", self.new_tokens, least=1, most=most)


@dataclass(frozen=True)
class Row:
    """A model of the table: a checkpoint's dimensions with this many decoder layers."""

    checkpoint: str
    decoder_layers: int


@dataclass(frozen=True)
class Job:
    """One row of the results: one system on one model at one setting.

    `setting` is what is run; `setting_batches` what the setting of that name prescribes.
    """

    setting: Setting
    setting_batches: int
    row: Row
    system: str
    device: str
    dtype: str

    @property
    def title(self) -> str:
        """The job in the progress line and in logs."""
        row = self.row
        return f"{self.setting.name} {row.checkpoint} {row.decoder_layers} {self.system}"


MODEL_SIZES: dict[str, ModelSize] = {
    "tiny": ModelSize(384, 6, 4, 4, 1536),
    "base": ModelSize(512, 8, 6, 6, 2048),
    "small": ModelSize(768, 12, 12, 12, 3072),
    "medium": ModelSize(1024, 16, 24, 24, 4096),
    "large-v3": ModelSize(1280, 20, 32, 32, 5120, mel_bins=128, vocabulary=51866),
    "large-v3-turbo": ModelSize(1280, 20, 32, 4, 5120, mel_bins=128, vocabulary=51866),
}

SETTINGS: dict[str, Setting] = {
    "default": Setting("default", batch_size=1, new_tokens=25, batches=100),
    "large": Setting("large", batch_size=32, new_tokens=256, batches=10),
    "small": Setting("small", batch_size=1, new_tokens=8, batches=5),
}

DECODER_LAYERS: dict[str, tuple[int, ...]] = {
    "tiny": (4, 2),
    "base": (6, 4, 2),
    "small": (12, 6, 4, 2),
    "medium": (24, 6, 4, 2),
    "large-v3": (32,),
    "large-v3-turbo": (4,),
}

DEFAULT_CHECKPOINTS = ("tiny", "base", "small", "medium")
DEFAULT_SYSTEMS = ("orig", "sdpa", "flash")


def default_settings(device: str) -> tuple[str, ...]:
    """Both tables on an accelerator; on a CPU, where they take days, the small setting."""
    return ("small",) if device == "cpu" else ("default", "large")


def describe_rows() -> str:
    """Every row that exists, as one line."""
    return "; ".join(
        f"{name} {', '.join(map(str, layers))}" for name, layers in DECODER_LAYERS.items()
    )


def select_rows(checkpoints: Sequence[str] = (), decoder_layers: Sequence[int] = ()) -> list[Row]:
    """Rows of these checkpoints with these decoder layers, in the table's order.

    By default every checkpoint of `DEFAULT_CHECKPOINTS`, with every depth.

    Raises:
        OptionError: a name is unknown, or a name or a depth selects nothing.
    """
    for name in checkpoints:
        check.one_of("checkpoint", name, DECODER_LAYERS)
    wanted = checkpoints or DEFAULT_CHECKPOINTS
    rows = [
        Row(name, layers)
        for name, depths in DECODER_LAYERS.items()
        for layers in depths
        if name in wanted and (not decoder_layers or layers in decoder_layers)
    ]
    idle = [name for name in checkpoints if name not in {row.checkpoint for row in rows}]
    unmatched = [n for n in decoder_layers if n not in {row.decoder_layers for row in rows}]
    if idle or unmatched:
        requested = f"{', '.join(wanted)} with decoder layers {', '.join(map(str, decoder_layers))}"
        nothing = ", ".join([*idle, *(f"{layers} layers" for layers in unmatched)])
        raise OptionError(
            f"{requested}: nothing to measure for {nothing}; rows: {describe_rows()} "
            "(large ones only when their checkpoint is named)"
        )
    return rows


def select_settings(
    names: Sequence[str],
    *,
    batch_size: int | None = None,
    new_tokens: int | None = None,
    batches: int | None = None,
) -> list[Setting]:
    """Settings by name, with sizes replaced where they are given.

    Raises:
        OptionError: a name is unknown, or a size is impossible.
    """
    chosen = []
    for name in dict.fromkeys(names):
        known = SETTINGS[check.one_of("setting", name, SETTINGS)]
        chosen.append(
            Setting(
                name,
                known.batch_size if batch_size is None else batch_size,
                known.new_tokens if new_tokens is None else new_tokens,
                known.batches if batches is None else batches,
            )
        )
    return chosen


def plan_jobs(
    settings: Sequence[Setting],
    rows: Sequence[Row],
    systems: Sequence[str],
    *,
    device: str,
    dtype: str,
) -> list[Job]:
    """Every system on every row at every setting; the systems of a row follow one another.

    Raises:
        OptionError: the dtype is unknown.
    """
    check.one_of("dtype", dtype, DTYPES)
    return [
        Job(setting, SETTINGS[setting.name].batches, row, system, device, dtype)
        for setting in settings
        for row in rows
        for system in dict.fromkeys(systems)
    ]
