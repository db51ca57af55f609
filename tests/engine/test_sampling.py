"""Greedy choices by ranges: those of the logits processors, one after the other."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whisper_flash_attention.engine.logits_processors import (
    History,
    LogitsProcessor,
    LogitsProcessors,
    MinLength,
    Suppress,
    SuppressAtBegin,
    Timestamps,
)
from whisper_flash_attention.engine.sampling import GreedyChooser

VOCABULARY, STAMPS, EOS = 60, 40, 30
NO_STAMPS = STAMPS - 1
CHOICES = st.sampled_from([3, 5, 11, EOS, STAMPS, STAMPS + 2, STAMPS + 3, VOCABULARY - 2])


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.lists(CHOICES, min_size=2, max_size=9), min_size=1, max_size=3),
    begin=st.integers(0, 3),
    least=st.integers(0, 6),
    max_initial=st.sampled_from([None, 0, 3, 50]),
    detect=st.booleans(),
    with_grammar=st.booleans(),
    lead=st.floats(-8, 8),
    seed=st.integers(0, 2**16),
)
def test_the_tokens_of_the_processors(
    rows: list[list[int]],
    begin: int,
    least: int,
    max_initial: int | None,
    detect: bool,
    with_grammar: bool,
    lead: float,
    seed: int,
) -> None:
    begin = min(begin, *map(len, rows))
    steps: list[LogitsProcessor] = [
        Suppress((4, 8, VOCABULARY + 5)),
        SuppressAtBegin((11, EOS), begin),
        MinLength(least, (EOS,)),
    ]
    if with_grammar:
        steps.append(Timestamps(STAMPS, begin, EOS, NO_STAMPS, max_initial, detect))
    processors = LogitsProcessors(tuple(steps))
    scores = torch.randn(len(rows), VOCABULARY, generator=torch.Generator().manual_seed(seed))
    scores[:, STAMPS:] += lead
    expected = torch.cat(
        [
            processors.apply(scores[index : index + 1], History(torch.tensor([row]), len(row)))
            for index, row in enumerate(rows)
        ]
    )
    fused = processors.kernel_processors
    assert fused is not None
    chooser = GreedyChooser(fused, VOCABULARY)
    tokens, logprobs = chooser.choose(scores, rows)
    possible = (expected > -math.inf).any(dim=1)
    best = expected.argmax(dim=1)
    assert [t for t, p in zip(tokens, possible, strict=True) if p] == best[possible].tolist()
    wanted = torch.log_softmax(expected, dim=1).gather(1, best[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(logprobs)[possible], wanted[possible])
    assert torch.equal(scores[possible], expected[possible])
