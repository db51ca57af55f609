"""Recorded passes: run at first use, then replayed; their memory."""

from __future__ import annotations

import gc

import pytest
import torch

from whisper_flash_attention.engine.cuda_graphs import GraphCache, GraphRecorder, capture_stream

pytestmark = pytest.mark.gpu


def test_a_pass_runs_once_for_every_call_on_the_numbers_of_then() -> None:
    graphs, x, y = (
        GraphCache(GraphRecorder()),
        torch.zeros(4, device="cuda"),
        torch.ones(4, device="cuda"),
    )

    def add() -> None:
        x.add_(y * 2)

    for count, value in ((1, 1.0), (2, 1.0), (3, 5.0)):
        y.fill_(value)
        graphs.run("add", add)
        assert x.tolist() == [{1: 2.0, 2: 4.0, 3: 14.0}[count]] * 4


def test_passes_of_other_names_are_others() -> None:
    graphs, x = GraphCache(GraphRecorder()), torch.zeros(1, device="cuda")
    for name, step in (("one", 1), ("ten", 10), ("one", 1), ("ten", 10)):
        graphs.run(name, lambda step=step: x.add_(step))  # type: ignore[misc]
    assert x.item() == 22


def test_recordings_share_a_stream_and_their_memory() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    assert capture_stream(device) is capture_stream(device)
    recorder, out = GraphRecorder(), torch.zeros(2**20, device="cuda")

    def work() -> None:
        out.copy_(out + 1)

    kept = [recorder.record(work)]
    before = torch.cuda.memory_reserved()
    kept += [recorder.record(work) for _ in range(5)]
    assert torch.cuda.memory_reserved() == before
    assert out[0].item() == 6
    recorder.release()
    kept[-1].replay()
    assert out[0].item() == 7
    kept.clear()
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < before


def test_passes_are_recorded_anew_after_all_others_are_gone() -> None:
    recorder, out = GraphRecorder(), torch.zeros(2**20, device="cuda")

    def work() -> None:
        out.copy_(out + 1)

    for count in range(1, 4):
        graph = recorder.record(work)
        graph.replay()
        assert out[0].item() == 2 * count
        del graph


def test_an_error_in_a_pass_leaves_nothing_recorded() -> None:
    graphs, x = GraphCache(GraphRecorder()), torch.zeros(1, device="cuda")

    def fail() -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        graphs.run("pass", fail)
    graphs.run("pass", lambda: x.add_(1))  # type: ignore[arg-type, return-value]
    graphs.run("pass", fail)
    assert x.item() == 2
