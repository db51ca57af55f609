"""Slots on a CUDA GPU: what each clip says alone, and memory that stays the same."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import pytest
import torch

from whisper_flash_attention import WhisperFlashAttentionForConditionalGeneration as Ours
from whisper_flash_attention.benchmark.random_weights import build_model
from whisper_flash_attention.benchmark.settings import MODEL_SIZES
from whisper_flash_attention.engine.engine import Engine
from whisper_flash_attention.engine.logits_processors import (
    LogitsProcessors,
    Suppress,
    SuppressAtBegin,
)
from whisper_flash_attention.engine.request import Request
from whisper_flash_attention.engine.scheduler import DecodeJob, FinishedJob
from whisper_flash_attention.engine.weights import collect_weights

pytestmark = pytest.mark.gpu
MOST = 96
# Two tokens whose logits differ by less, relative to the largest, may change places.
TIE = 1e-4
FORMS = pytest.mark.parametrize("form", ["projected", "absorbed"])


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    model: Any = build_model(Ours, MODEL_SIZES["tiny"], 2, device="cuda", dtype=torch.float32)
    yield Engine(collect_weights(model))
    gc.collect()
    torch.cuda.empty_cache()


def request(begin: int, answer: int, form: str) -> Request:
    """Many tokens end an answer, so that rows do so at different places."""
    rules = LogitsProcessors((Suppress((7, 9)), SuppressAtBegin((11, 12), begin)))
    ends = tuple(range(1000, 4000))
    return Request(
        rules,
        begin + answer,
        ends,
        3,
        want_logprobs=True,
        probe=(20, begin // 2),
        cross_attention=form,
    )


def jobs_of(count: int, form: str, engine: Engine, longest: int = 5) -> list[DecodeJob]:
    generator = torch.Generator("cuda").manual_seed(0)
    keys, width = engine.weights.encoder.positions.shape
    found = []
    for number in range(count):
        states = torch.randn(keys, width, generator=generator, device="cuda")
        begin, answer = 1 + number % longest, 1 + 17 * number % 60
        prompt = [100 + 31 * number % 900 + place for place in range(begin)]
        found.append(DecodeJob(states, prompt, request(begin, answer, form), number))
    return found


def stream(
    engine: Engine, jobs: Sequence[DecodeJob], slots: int, **options: Any
) -> list[FinishedJob]:
    waiting = iter(jobs)
    answers = engine.decode_stream(
        lambda count: list(islice(waiting, count)), slots, max_length=MOST, **options
    )
    return list(answers)


def check_tie(
    engine: Engine, job: DecodeJob, found: tuple[int, ...], wanted: tuple[int, ...]
) -> None:
    """Answers may differ from where the logits of two tokens are as good as equal."""
    place = next(
        i for i, (one, other) in enumerate(zip(found, wanted, strict=False)) if one != other
    )
    prompt = torch.tensor([[*job.prompt, *wanted[:place]]], device="cuda")
    request = Request(LogitsProcessors(), prompt.shape[1] + 1, (), 3, want_logits=True)
    logits = engine.decode(job.states[None], prompt, request).logits
    assert logits is not None
    gap = (logits[0][0, found[place]] - logits[0][0, wanted[place]]).abs()
    assert gap < TIE * logits[0].abs().max(), f"job {job.tag} differs at {place}"


def check(engine: Engine, jobs: Sequence[DecodeJob], found: Sequence[FinishedJob]) -> None:
    by_tag = {each.job.tag: each for each in found}
    assert len(by_tag) == len(found) == len(jobs)
    for job in jobs:
        prompt = torch.tensor([job.prompt], device="cuda")
        decoded = engine.decode(job.states[None], prompt, job.request)
        row = decoded.sequences[0, len(job.prompt) :].tolist()
        ends = [place for place, token in enumerate(row) if token in job.request.eos]
        finished = by_tag[job.tag]
        wanted = tuple(row[: ends[0] + 1] if ends else row)
        if finished.tokens != wanted:
            check_tie(engine, job, finished.tokens, wanted)
            continue
        assert decoded.sum_logprobs is not None and decoded.probe_probability is not None
        assert finished.sum_logprob == pytest.approx(float(decoded.sum_logprobs[0]), abs=1e-2)
        assert finished.probe_probability == pytest.approx(
            float(decoded.probe_probability[0]), rel=1e-2
        )


@FORMS
@pytest.mark.parametrize(("slots", "refill"), [(1, None), (5, None), (16, 4), (26, 8)])
def test_recorded_slots_say_what_each_clip_says_alone(
    engine: Engine, form: str, slots: int, refill: int | None
) -> None:
    jobs = jobs_of(40, form, engine)
    for _ in range(2):  # first kernel by kernel, then recorded
        check(engine, jobs, stream(engine, jobs, slots, refill=refill))


@FORMS
def test_prompts_too_long_for_the_kernels(engine: Engine, form: str) -> None:
    jobs = jobs_of(12, form, engine, longest=30)
    check(engine, jobs, stream(engine, jobs, 4))


def test_memory_does_not_grow_with_the_number_of_clips(engine: Engine) -> None:
    def peak(jobs: Sequence[DecodeJob]) -> int:
        torch.cuda.reset_peak_memory_stats()
        stream(engine, jobs, 8)
        return torch.cuda.max_memory_allocated()

    jobs = jobs_of(60, "absorbed", engine)
    stream(engine, jobs[:20], 8)
    few = peak(jobs[:20])
    held = torch.cuda.memory_allocated()
    assert peak(jobs) <= few + 2**20
    assert torch.cuda.memory_allocated() == held
