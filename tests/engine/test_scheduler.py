"""Many clips through few slots say what each says alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperForConditionalGeneration

from tests.engine.test_cuda_decoder import Replayed, few_programs
from whisper_flash_attention.engine import cuda_slots, memory_plan
from whisper_flash_attention.engine import engine as engine_module
from whisper_flash_attention.engine import layout as layouts
from whisper_flash_attention.engine.cuda_decoder import CudaDecoder
from whisper_flash_attention.engine.cuda_slots import STEPS_PER_POLL, CudaSlots
from whisper_flash_attention.engine.engine import Engine
from whisper_flash_attention.engine.layout import state_bytes
from whisper_flash_attention.engine.logits_processors import (
    History,
    LogitsProcessors,
    MinLength,
    Suppress,
    SuppressAtBegin,
    Timestamps,
)
from whisper_flash_attention.engine.request import Request
from whisper_flash_attention.engine.scheduler import DecodeJob, FinishedJob, run_slots
from whisper_flash_attention.engine.weights import collect_weights
from whisper_flash_attention.errors import NotFinite, OptionError
from whisper_flash_attention.kernels.launch import interpreted

__all__ = ["few_programs"]  # a fixture that every test here uses
# 300 tokens, the last ones timestamps.
STAMPS, END, KEYS, WIDTH, MOST = 250, 240, 12, 128, 20
FORMS = pytest.mark.parametrize("form", ["projected", "absorbed"])
NAN = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.fixture
def engine(small_model: WhisperForConditionalGeneration) -> Engine:
    """It takes the plain path."""
    return Engine(collect_weights(small_model))


@pytest.fixture
def on_kernels(
    small_model: WhisperForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Engine]:
    """An engine that takes the kernels, interpreted, with one layer and without idle steps."""
    if not interpreted():
        pytest.skip("needs Triton's interpreter")
    model = copy.deepcopy(small_model)
    model.model.decoder.layers = model.model.decoder.layers[:1]
    monkeypatch.setattr(layouts, "has_kernels", lambda device: True)
    monkeypatch.setattr(engine_module, "GraphCache", Replayed)
    monkeypatch.setattr(cuda_slots, "STEPS_PER_POLL", 1)
    yield Engine(collect_weights(model))


def plain_twin(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An engine on the same weights that takes the plain path."""
    monkeypatch.setattr(layouts, "has_kernels", lambda device: False)
    twin = copy.copy(engine)
    twin._buffers = engine._new_buffers()
    return twin


def request(begin: int, answer: int, *, grammar: bool = False, **options: Any) -> Request:
    """Of a prompt of `begin` tokens; at most `answer` tokens, or until one of many ends."""
    rules: list[Any] = [Suppress((7, 9)), SuppressAtBegin((11, 12), begin)]
    ends = tuple(range(40))
    if grammar:
        rules.append(Timestamps(STAMPS, begin, END, END + 1, 20))
        ends = (END,)
    options = {"want_logprobs": True, "probe": (20, begin // 2)} | options
    return Request(LogitsProcessors(tuple(rules)), begin + answer, ends, 3, **options)


def jobs_of(sizes: Sequence[tuple[int, int]], **options: Any) -> list[DecodeJob]:
    """Clips with prompts and answers of so many tokens, tagged by their number."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number, (begin, answer) in enumerate(sizes):
        states = torch.randn(KEYS, WIDTH, generator=generator)
        prompt = torch.randint(0, STAMPS - 20, (begin,), generator=generator)
        found.append(DecodeJob(states, prompt.tolist(), request(begin, answer, **options), number))
    return found


def stream(
    engine: Engine, jobs: Sequence[DecodeJob], slots: int, **options: Any
) -> list[FinishedJob]:
    waiting = iter(jobs)
    more = lambda count: list(islice(waiting, count))  # noqa: E731
    return list(engine.decode_stream(more, slots, max_length=MOST, **options))


def alone(engine: Engine, job: DecodeJob) -> tuple[tuple[int, ...], float, float]:
    """Tokens of a clip decoded by itself, their sum, and the probability of the probe token."""
    decoded = engine.decode(job.states[None], torch.tensor([job.prompt]), job.request)
    row = decoded.sequences[0, len(job.prompt) :].tolist()
    assert decoded.sum_logprobs is not None and decoded.probe_probability is not None
    ends = [place for place, token in enumerate(row) if token in job.request.eos]
    tokens = tuple(row[: ends[0] + 1] if ends else row)
    return tokens, float(decoded.sum_logprobs[0]), float(decoded.probe_probability[0])


def check(found: Sequence[FinishedJob], engine: Engine, jobs: Sequence[DecodeJob]) -> None:
    by_tag = {each.job.tag: each for each in found}
    assert len(by_tag) == len(found) == len(jobs)
    for job in jobs:
        tokens, total, probe_probability = alone(engine, job)
        assert by_tag[job.tag].tokens == tokens, f"job {job.tag}"
        assert by_tag[job.tag].sum_logprob == pytest.approx(total, abs=1e-4)
        assert by_tag[job.tag].probe_probability == pytest.approx(probe_probability, rel=1e-4)


def spoil(engine: Engine) -> None:
    """Fill what is kept between calls with signalling NaN and impossible numbers."""
    for kept in (engine._buffers, *engine._idle):
        assert kept._memory._arena is not None
        kept._memory._arena._block.view(torch.int32).fill_(0x7FA00000)
        kept._last = None


MIXED = [(2, 5), (1, 1), (3, 7), (1, 6), (2, 2), (4, 3), (2, 9)]


@FORMS
@pytest.mark.parametrize("grammar", [False, True], ids=["masks", "grammar"])
def test_more_jobs_than_slots_with_prompts_and_answers_of_many_lengths(
    engine: Engine, form: str, grammar: bool
) -> None:
    jobs = jobs_of(MIXED, grammar=grammar, cross_attention=form)
    found = stream(engine, jobs, 3)
    check(found, engine, jobs)
    spoil(engine)
    assert [each.tokens for each in stream(engine, jobs, 3)] == [each.tokens for each in found]
    assert len({len(each.tokens) for each in found}) > 2
    assert [each.job.tag for each in found] != sorted(each.job.tag for each in found)


@pytest.mark.parametrize(
    ("form", "grammar"), [("projected", True), ("absorbed", False)], ids=["projected", "absorbed"]
)
def test_kernels_say_what_the_plain_path_says(
    on_kernels: Engine, monkeypatch: pytest.MonkeyPatch, form: str, grammar: bool
) -> None:
    jobs = jobs_of([(2, 2), (1, 4), (3, 1), (1, 3)], grammar=grammar, cross_attention=form)
    found = stream(on_kernels, jobs, 2)
    # Bit for bit what it says in these slots by itself, whatever lies in memory.
    spoil(on_kernels)
    [by_itself] = stream(on_kernels, jobs[3:], 2)
    assert by_itself in found
    check(found, plain_twin(on_kernels, monkeypatch), jobs)


@pytest.mark.parametrize("kernels", [False, True])
def test_the_memory_is_what_was_planned(
    on_kernels: Engine, monkeypatch: pytest.MonkeyPatch, kernels: bool
) -> None:
    if not kernels:
        monkeypatch.setattr(layouts, "has_kernels", lambda device: False)
    stream(on_kernels, jobs_of([(2, 1), (1, 1)]), 2)
    decoder = on_kernels.weights.decoder
    slots = layouts.slots_layout(decoder, slots=2, keys=KEYS, max_length=MOST, form="auto")
    entry = layouts.prefill_layout(decoder, slots, clips=1, prompt=2)
    used = (slots, entry) if kernels else (slots,)
    planned = [state_bytes(each) + memory_plan.kernel_bytes(each) for each in used]
    arenas = [each._memory._arena for each in (on_kernels._idle[0], on_kernels._buffers)]
    assert planned == [arena.capacity for arena in arenas if arena is not None]


def test_kernels_take_prompts_too_long_for_them(
    on_kernels: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = layouts.KERNEL_PROMPT_TOKENS + 2
    jobs = jobs_of([(long, 2), (2, 3), (long + 3, 1)])
    found = stream(on_kernels, jobs, 2, refill=2)
    check(found, plain_twin(on_kernels, monkeypatch), jobs)


@NAN
def test_kernels_name_the_job_that_is_not_finite(on_kernels: Engine) -> None:
    jobs = jobs_of([(1, 2), (2, 2), (1, 2)])
    jobs[1].states[3, 8] = math.nan
    with pytest.raises(NotFinite, match="not finite in 1: the features"):
        stream(on_kernels, jobs, 2)


@NAN
def test_a_job_that_is_not_finite_is_named_and_spoils_no_later_stream(engine: Engine) -> None:
    jobs = jobs_of(MIXED)
    wanted = stream(engine, jobs[:3], 3)
    broken = replace(jobs[4], states=jobs[4].states * math.nan, tag="the fifth")
    with pytest.raises(NotFinite, match="not finite in the fifth: the features"):
        stream(engine, [*jobs[:4], broken], 3)
    again = stream(engine, jobs[:3], 3)
    assert [each.tokens for each in again] == [each.tokens for each in wanted]


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=9),
    slots=st.integers(1, 5),
    data=st.data(),
)
def test_any_jobs_in_any_number_of_slots(
    small_model: WhisperForConditionalGeneration, sizes: Any, slots: int, data: Any
) -> None:
    engine = Engine.of(small_model)
    jobs = jobs_of(sizes)
    found = stream(engine, jobs, slots, refill=data.draw(st.integers(1, slots)))
    check(found, engine, jobs)


def test_clips_are_asked_for_when_slots_are_free(engine: Engine) -> None:
    jobs = jobs_of(MIXED)
    waiting, requested, taken = iter(jobs), [], 0
    done = 0

    def more(count: int) -> list[DecodeJob]:
        nonlocal taken
        # As many as are free, and only when two are.
        assert count == 3 - (taken - done) >= 2 or taken == done
        requested.append(count)
        found = list(islice(waiting, count))
        taken += len(found)
        return found

    for _ in engine.decode_stream(more, 3, max_length=MOST, refill=2):
        done += 1
        assert taken - done <= 3
    assert requested[0] == 3 and taken == done == len(jobs)


def test_jobs_may_come_when_others_have_been_answered(engine: Engine) -> None:
    """A recording's next window is known when the one before has been read."""
    jobs = jobs_of([(1, 3), (2, 3), (3, 3)])
    ready, found = [jobs[0]], []

    def more(count: int) -> list[DecodeJob]:
        given, ready[:] = ready[:count], ready[count:]
        return given

    for finished in engine.decode_stream(more, 2, max_length=MOST):
        found.append(finished)
        ready += jobs[len(found) : len(found) + 1]
    assert [each.job for each in found] == jobs
    check(found, engine, jobs)


def test_other_decodes_may_come_between_answers(engine: Engine) -> None:
    jobs = jobs_of(MIXED)
    wanted = [alone(engine, job)[0] for job in jobs]
    waiting = iter(jobs)

    def more(count: int) -> list[DecodeJob]:
        alone(engine, jobs[0])
        return list(islice(waiting, count))

    outer = {}
    for finished in engine.decode_stream(more, 3, max_length=MOST):
        outer[finished.job.tag] = finished.tokens
        assert alone(engine, jobs[2])[0] == wanted[2]
        inner = {each.job.tag: each.tokens for each in stream(engine, jobs[:2], 2)}
        assert inner == {0: wanted[0], 1: wanted[1]}
    assert [outer[number] for number in range(len(jobs))] == wanted


def test_no_jobs(engine: Engine) -> None:
    assert stream(engine, [], 3) == []
    assert engine._idle == []


def test_a_stream_leaves_its_memory_to_the_next(engine: Engine) -> None:
    stream(engine, jobs_of(MIXED), 3)
    [kept] = engine._idle
    arena = kept._memory._arena
    stream(engine, jobs_of(MIXED[:2]), 2)
    assert engine._idle == [kept] and kept._memory._arena is arena
    unfinished = engine.decode_stream(lambda count: jobs_of(MIXED[:count]), 2, max_length=MOST)
    next(unfinished)
    assert engine._idle == []
    unfinished.close()
    assert engine._idle == [kept]
    engine.release()
    assert engine._idle == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": []}, "prompt of 0 tokens"),
        ({"prompt": [5] * 9}, "prompt of 9 tokens leaves no room for new tokens in 3"),
        ({"states": torch.zeros(KEYS + 1, WIDTH)}, "do not match the stream's"),
        (
            {"request": Request(LogitsProcessors(), 9, (4,), 3)},
            "may differ only in lengths and positions",
        ),
        ({"request": request(1, MOST)}, "more than the stream's 20"),
        ({"request": request(1, 2, sample=True)}, "decode greedily"),
    ],
)
def test_jobs_that_do_not_go_together_are_refused(
    engine: Engine, change: dict[str, Any], message: str
) -> None:
    jobs = jobs_of([(1, 2), (1, 2)])
    with pytest.raises(OptionError, match=message):
        stream(engine, [jobs[0], replace(jobs[1], **change)], 2)


@pytest.mark.parametrize(("slots", "refill"), [(0, None), (2, 3), (2, 0)])
def test_numbers_that_make_no_sense_are_refused(engine: Engine, slots: int, refill: Any) -> None:
    with pytest.raises(OptionError, match="1 or more"):
        stream(engine, jobs_of(MIXED), slots, refill=refill)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.lists(st.integers(0, 299), min_size=1, max_size=9),
            st.integers(0, 9),
            st.integers(0, 12),
            st.booleans(),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_tables_of_prompts_hold_what_the_processors_compute(
    rows: list[tuple[list[int], int, int, bool]],
) -> None:
    jobs = []
    for tokens, begin, least, grammar in rows:
        steps: list[Any] = [Suppress((7,)), SuppressAtBegin((11,), begin), MinLength(least, (END,))]
        if grammar:
            steps.append(Timestamps(STAMPS, min(begin, len(tokens)), END, END + 1, 20))
        found = Request(LogitsProcessors(tuple(steps)), MOST, (END,), 3, probe=(20, begin))
        jobs.append(DecodeJob(torch.zeros(KEYS, WIDTH), tokens, found, len(jobs)))
    slots = list(range(10, 10 + len(jobs)))
    prompts = cuda_slots.ragged_prompts(jobs, slots, 300, torch.device("cpu"))
    longest = prompts.prompt.shape[1]
    assert prompts.slots.tolist() == slots
    for row, job in enumerate(jobs):
        length = len(job.prompt)
        processors = cuda_slots.kernel_processors_of(job.request)
        history = History(torch.tensor([job.prompt]), length)
        assert prompts.prompt[row].tolist() == [*job.prompt, *[0] * (longest - length)]
        assert int(prompts.first_positions[row]) == length - longest
        assert job.request.probe is not None
        at = longest - length + job.request.probe[1]
        assert int(prompts.probe_positions[row]) == at
        assert tuple(prompts.settings[row].tolist()) == processors.settings(300, MOST)
        assert prompts.limits[row].tolist() == processors.limits(history, 300)[0].tolist()


@FORMS
def test_groups_that_follow_one_another_replay_what_joins_them_to_the_slots(
    on_kernels: Engine, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """Groups of 2 are recorded; one of 3 is not."""
    jobs = jobs_of([(2, 2)] * 2 + [(2, 3)] * 2 + [(1, 2), (2, 1), (4, 2)], cross_attention=form)
    coming = iter([jobs[:2], jobs[2:4], jobs[4:]])
    found = list(on_kernels.decode_stream(lambda _: next(coming, []), 4, max_length=MOST, refill=3))
    check(found, plain_twin(on_kernels, monkeypatch), jobs)


class NotedSlots:
    """Slots that note calls, and finish a job in every poll."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.jobs: list[DecodeJob] = []

    def start(self, jobs: Sequence[DecodeJob]) -> None:
        self.calls.append("start")
        self.jobs += jobs

    def advance_all(self) -> list[FinishedJob]:
        self.calls.append("advance")
        return [FinishedJob(self.jobs.pop(0), (1,), 0.0)]

    def queue_steps(self) -> None:
        self.calls.append("queue")


def test_a_device_gets_steps_before_the_host_prepares_jobs_and_takes_results() -> None:
    jobs = jobs_of([(1, 1)] * 3)
    waiting, rows = jobs[2:], NotedSlots()

    def more(count: int) -> list[DecodeJob]:
        rows.calls.append("more")
        found, waiting[:] = list(waiting), []
        return found

    stream = run_slots(
        jobs[:2],
        more,
        rows,
        slots=2,
        refill=1,
        check=lambda job: None,
        exclusive=nullcontext,
        is_waiting=lambda free: bool(waiting),
    )
    for finished in stream:
        rows.calls.append(f"result {jobs.index(finished.job)}")
    assert rows.calls == [
        *("start", "advance", "queue", "more", "start", "result 0"),
        *("advance", "result 1", "more", "advance", "result 2", "more"),
    ]


def test_polls_are_further_apart_while_the_device_runs_dry() -> None:
    slots = object.__new__(CudaSlots)
    taken: list[int] = []
    ran_dry = [True, True, True, False, False]
    slots._decoder = cast(CudaDecoder, SimpleNamespace(step=taken.append))
    slots._pad, slots._steps, slots._poll, slots._jobs = 0, STEPS_PER_POLL, None, []
    event = SimpleNamespace(query=lambda: ran_dry.pop(0), record=lambda: None)
    slots._queued = cast(torch.cuda.Event, event)
    slots._start_poll = lambda: None  # type: ignore[method-assign,assignment,return-value]
    found = []
    while ran_dry:
        before = len(taken)
        assert slots.advance_all() == []
        found.append(len(taken) - before)
    assert found == [8, 16, 16, 15, 14]
