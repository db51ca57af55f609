"""Rules as data: small tensors that the kernels `logits` and `pick` read.

A captured CUDA graph repeats its launches with the same arguments. What differs from call to call
and from slot to slot (suppressed tokens, lengths, the state of the timestamp grammar) therefore
lies in tensors: `flags` per token, `settings` and `limits` per slot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from whisper_flash_attention.engine.logits_processors import History, Timestamps

# Bits of a token in `FusedRules.flags`; `FusedRules.limits` says which of them forbid it now.
SUPPRESSED = 1
SUPPRESSED_AT_BEGIN = 2
WAITS_FOR_LENGTH = 4
NO_TIMESTAMPS = 8
ENDS = 16


@dataclass(frozen=True)
class FusedRules:
    """Rules that only forbid tokens, as data for the kernels `logits` and `pick`.

    Args:
        suppress, suppress_at_begin, waiting: token ids that are forbidden always, where
            `begin_index` tokens are there, and while there are fewer than `min_length`.
        timestamps: the timestamp grammar, applied after them.
    """

    suppress: tuple[int, ...] = ()
    suppress_at_begin: tuple[int, ...] = ()
    begin_index: int = -1
    waiting: tuple[int, ...] = ()
    min_length: int = 0
    timestamps: Timestamps | None = None

    def kind(self, eos: tuple[int, ...]) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """What `flags` follow from: each of the bits, and the tokens that bear it."""
        stamps = (self.timestamps.no_timestamps,) if self.timestamps else ()
        return (
            (SUPPRESSED, self.suppress),
            (SUPPRESSED_AT_BEGIN, self.suppress_at_begin),
            (WAITS_FOR_LENGTH, self.waiting),
            (NO_TIMESTAMPS, stamps),
            (ENDS, eos),
        )

    def flags(self, vocabulary: int, eos: tuple[int, ...], device: torch.device) -> Tensor:
        """Per token the bits SUPPRESSED ... ENDS, uint8 [V]; the ids in `eos` end a slot."""
        ids = torch.arange(vocabulary, device=device)
        flags = torch.zeros(vocabulary, dtype=torch.uint8, device=device)
        for bit, tokens in self.kind(eos):
            wanted = torch.tensor(tokens, dtype=torch.int64, device=device)
            flags += torch.isin(ids, wanted).to(torch.uint8) * bit
        return flags

    def settings(self, vocabulary: int, max_length: int) -> tuple[int, ...]:
        """One slot's row of the kernels' `settings` [B, 8] int32.

        In order: the length at which SUPPRESSED_AT_BEGIN forbids, the minimum and the maximum
        length, the length at which the grammar begins (-1: no grammar), the end of the ids allowed
        as first timestamp, the grammar's eos, the first timestamp's id (the vocabulary's size
        without grammar: all is text), and whether timestamps are detected by their probability.
        """
        grammar = self.timestamps
        if grammar is None:
            tail = (-1, vocabulary, 0, vocabulary, 0)
        else:
            tail = (
                grammar.begin_index,
                grammar.initial_end(vocabulary),
                grammar.eos,
                grammar.timestamp_begin,
                int(grammar.detect),
            )
        return (self.begin_index, self.min_length, max_length, *tail)

    def limits(self, history: History, vocabulary: int) -> Tensor:
        """What may come next, int32 [B, 4].

        Per slot: the bits of `flags` that forbid a token now, the first text id, the first
        timestamp id and the end of the timestamp ids. After this first time `pick` keeps them up.
        """
        batch, lengths = history.tokens.shape[0], history.lengths
        forbid = SUPPRESSED + (lengths == self.begin_index) * SUPPRESSED_AT_BEGIN
        forbid = forbid + (lengths < self.min_length) * WAITS_FOR_LENGTH
        if self.timestamps is None:
            row = (torch.zeros_like(lengths), *(torch.full_like(lengths, vocabulary),) * 2)
        else:
            forbid = forbid + NO_TIMESTAMPS
            row = self.timestamps.limits(history, vocabulary)
        return torch.cat([column.expand(batch, 1) for column in (forbid, *row)], dim=1).int()
