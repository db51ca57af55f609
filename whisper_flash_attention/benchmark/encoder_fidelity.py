"""How far the encoder's states are from stock's in float32, on weights and speech that are real.

As in `encoder`, weights and features are rounded to the dtype first, so that the yardstick computes
with the same numbers in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from whisper_flash_attention.benchmark.encoder import (
    encode_in_parts,
    our_encoder,
    relative_error,
    stock_encoder,
)
from whisper_flash_attention.benchmark.environment import Environment
from whisper_flash_attention.benchmark.systems import FLASH
from whisper_flash_attention.engine.engine import Engine

FIDELITY = "encoder-fidelity"
DTYPES = ("float32", "float16", "bfloat16")
# What our error may be: in float32, and in half precision times that of stock with SDPA.
FLOAT32_BOUND = 1e-5
HALF_FACTOR = 1.2

Errors = tuple[float, float]


@dataclass(frozen=True)
class FidelityRow:
    """One system in one dtype; names are those of `results.ResultRow`.

    `states_error` is relative (Frobenius), over all clips. In half precision a few positions make
    most of it; `position_error` is the median over positions of a position's own relative error.
    `states_bound` is what our `states_error` may be; None for stock.
    """

    checkpoint: str
    encoder_layers: int
    system: str
    device: str
    dtype: str
    batch_size: int
    clips: int
    features: str
    environment: dict[str, Any]
    states_error: float
    position_error: float
    states_bound: float | None = None
    setting: str = FIDELITY

    @property
    def within_bound(self) -> bool | None:
        """Whether the error is no larger than it may be; None where there is no bound."""
        return None if self.states_bound is None else self.states_error <= self.states_bound

    def as_json(self) -> dict[str, Any]:
        """All fields, and the verdict."""
        return asdict(self) | {"within_bound": self.within_bound}


@dataclass(frozen=True)
class Speech:
    """Features [clips, mel bins, 3000], float32, on the host; what they are; clips per call."""

    features: torch.Tensor
    description: str
    batch_size: int = 1


def measure_fidelity(
    checkpoint: str,
    stock: Any,
    ours: Any,
    speech: Speech,
    environment: Environment,
    dtypes: Sequence[str] = DTYPES,
) -> list[FidelityRow]:
    """Two rows per dtype: stock with SDPA, and ours.

    Args:
        checkpoint: the name of the weights.
        stock, ours: both classes with the same weights in float32, on one device. They stay so.
        speech: what is encoded.
        environment: of this machine.
        dtypes: any of `DTYPES`.
    """
    rows = []
    for dtype in dtypes:
        sdpa, flash = states_errors(stock, ours, speech, getattr(torch, dtype))
        bound = FLOAT32_BOUND if dtype == "float32" else HALF_FACTOR * sdpa[0]
        for system, errors, limit in (("sdpa", sdpa, None), (FLASH, flash, bound)):
            rows.append(
                FidelityRow(
                    checkpoint=checkpoint,
                    encoder_layers=int(stock.config.encoder_layers),
                    system=system,
                    device=str(stock.device),
                    dtype=dtype,
                    batch_size=speech.batch_size,
                    clips=len(speech.features),
                    features=speech.description,
                    environment=environment.as_json(),
                    states_error=errors[0],
                    position_error=errors[1],
                    states_bound=limit,
                )
            )
    return rows


def states_errors(
    stock: Any, ours: Any, speech: Speech, dtype: torch.dtype
) -> tuple[Errors, Errors]:
    """`states_error` and `position_error` in this dtype: of stock with SDPA, and of ours."""
    features = speech.features.to(stock.device, dtype)
    rounded = copy.deepcopy(stock).to(dtype)
    cudnn = torch.backends.cudnn
    # Stock's convolutions in float32 would be TensorFloat-32.
    with cudnn.flags(enabled=cudnn.enabled, allow_tf32=False):
        encode = stock_encoder(copy.deepcopy(rounded).float(), "eager")
        wanted = encode_in_parts(encode, features.float(), speech.batch_size)
        encode = stock_encoder(rounded, "sdpa")
        sdpa = encode_in_parts(encode, features, speech.batch_size)
    model = copy.deepcopy(ours).to(dtype)
    found = encode_in_parts(our_encoder(model), features, speech.batch_size)
    Engine.forget(model)
    return _both_errors(sdpa, wanted), _both_errors(found, wanted)


def _both_errors(found: torch.Tensor, wanted: torch.Tensor) -> Errors:
    """Over all elements, and the median over positions, for states [B, 1500, D]."""
    apart = (found.float() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    return relative_error(found, wanted), float(apart.median())
