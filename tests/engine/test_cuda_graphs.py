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

    for value, total in ((1.0, 2.0), (1.0, 4.0), (5.0, 14.0), (0.5, 15.0)):
        y.fill_(value)
        graphs.run("add", add)
        assert x.tolist() == [total] * 4


def test_a_pass_is_recorded_when_it_comes_again() -> None:
    recorder, x = GraphRecorder(), torch.zeros(1, device="cuda")
    launches: list[int] = []

    def add() -> None:
        launches.append(len(recorder._alive))
        x.add_(1)

    graphs = GraphCache(recorder)
    for _ in range(4):
        graphs.run("add", add)
    assert x.item() == 4 and launches == [0, 0] and len(recorder._alive) == 1
    warm = GraphCache(recorder, is_warm=True)
    warm.run("add", add)
    warm.run("add", add)
    assert x.item() == 6 and len(launches) == 3


def test_passes_of_other_names_are_others() -> None:
    graphs, x = GraphCache(GraphRecorder()), torch.zeros(1, device="cuda")
    for name, step in (("one", 1), ("ten", 10)) * 3:
        graphs.run(name, lambda step=step: x.add_(step))  # type: ignore[misc]
    assert x.item() == 33


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
    for _ in range(2):
        graphs.run("pass", lambda: x.add_(1))  # type: ignore[arg-type, return-value]
    graphs.run("pass", fail)
    assert x.item() == 3
