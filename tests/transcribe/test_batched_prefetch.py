"""Batches made ready ahead: in order, with their errors in place."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from whisper_flash_attention.transcribe.batched import prefetch

DEVICES = pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def clips(count: int) -> list[np.ndarray]:
    return [np.arange(index, 3 * index + 1, dtype=np.float32) for index in range(1, count + 1)]


@DEVICES
def test_clips_are_on_the_device_in_their_order(name: str) -> None:
    counts = [1, 40, 3]
    found = list(prefetch(iter(counts), clips, torch.device(name)))
    assert [batch for batch, _ in found] == counts
    for count, there in found:
        for one, other in zip(there, clips(count), strict=True):
            assert torch.equal(torch.as_tensor(one).cpu(), torch.from_numpy(other))


@DEVICES
def test_an_error_comes_where_its_batch_would(name: str) -> None:
    def batches() -> Iterator[int]:
        yield 1
        raise ValueError("no more of it")

    prefetched = prefetch(batches(), clips, torch.device(name))
    assert next(prefetched)[0] == 1
    with pytest.raises(ValueError, match="no more of it"):
        next(prefetched)


@DEVICES
def test_it_may_be_left_early(name: str) -> None:
    prefetched = prefetch(iter([2, 2, 2]), clips, torch.device(name))
    next(prefetched)
    prefetched.close()  # type: ignore[attr-defined]
