"""An engine lives as long as its model stays what and where it was, and serves threads in turn."""

from __future__ import annotations

import copy
import gc
import os
import signal
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from transformers import WhisperForConditionalGeneration
from transformers.generation.streamers import BaseStreamer

from tests.hf.conftest import make_twins
from tests.random_whisper import perturbed
from whisper_flash_attention.engine.engine import Engine
from whisper_flash_attention.engine.logits_processors import LogitsProcessors, Suppress
from whisper_flash_attention.engine.request import Request
from whisper_flash_attention.engine.weights import collect_weights

REQUEST = Request(LogitsProcessors((Suppress((7,)),)), 12, (), 0, want_logits=True)


@pytest.fixture
def model(small_model: WhisperForConditionalGeneration) -> WhisperForConditionalGeneration:
    return copy.deepcopy(small_model)


def features(batch: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 80, 200, generator=torch.Generator().manual_seed(seed))


def answer(engine: Engine, batch: int = 2, seed: int = 0, request: Request = REQUEST) -> Any:
    """Ids [B, L] and the last logits [B, V]."""
    prompt = torch.tensor([[298, 5]]).expand(batch, -1)
    decoded = engine.decode(engine.encode(features(batch, seed)), prompt, request)
    assert decoded.logits is not None
    return decoded.sequences, decoded.logits[-1]


def check_same(found: Any, wanted: Any) -> None:
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


def test_a_model_keeps_its_engine(model) -> None:
    engine = Engine.of(model)
    assert Engine.of(model) is engine
    answer(engine)
    assert Engine.of(model) is engine
    other = copy.deepcopy(model)
    assert Engine.of(other) is not engine
    assert Engine.of(model) is engine


def test_logits_are_those_of_the_model(model) -> None:
    ids, logits = answer(Engine.of(model))
    with torch.no_grad():
        wanted = model(features(2), decoder_input_ids=ids[:, :-1]).logits
    torch.testing.assert_close(logits, wanted[:, -1], rtol=0, atol=1e-4)
    wanted[:, :, 7] = -torch.inf
    assert torch.equal(ids[:, 2:], wanted[:, 1:].argmax(dim=-1))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("scored", [False, True])
def test_log_probabilities_are_those_of_the_tokens_and_their_end(model, device, scored) -> None:
    engine = Engine.of(model.to(device))
    rules = LogitsProcessors((Suppress((7,)),))
    prompt = torch.tensor([[298, 5]], device=device).expand(3, -1)
    states = engine.encode(features(3).to(device))
    free = engine.decode(states, prompt, Request(rules, 12, (), 0)).sequences
    ends = (int(free[1, 6]),)  # ends row 1 with its fifth token, if not before
    request = Request(rules, 12, ends, 0, want_logprobs=True, want_scores=scored)
    decoded = engine.decode(states, prompt, request)
    with torch.no_grad():
        inputs = decoded.sequences[:, :-1]
        logits = model(features(3).to(device), decoder_input_ids=inputs).logits[:, 1:]
    logits[:, :, 7] = -torch.inf
    answers = decoded.sequences[:, 2:]
    each = logits.log_softmax(-1).gather(2, answers[:, :, None])[:, :, 0]
    over = (answers == ends[0]).cumsum(1) - (answers == ends[0]).int() > 0
    assert decoded.sum_logprobs is not None and over.any()
    wanted = each.masked_fill(over, 0).sum(1)
    torch.testing.assert_close(decoded.sum_logprobs, wanted, rtol=0, atol=2e-3)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("place", "length"), [(1, 3), (0, 1), (9, 12)])
def test_a_watched_token_has_the_probability_that_the_model_gives_it(
    model, device, place, length
) -> None:
    engine = Engine.of(model.to(device))
    tokens = [298, 5, 17, *range(20, 40)][:length]
    prompt = torch.tensor([tokens], device=device).expand(2, -1)
    inputs = features(2).to(device)
    request = Request(LogitsProcessors((Suppress((9,)),)), length + 2, (), 0, probe=(9, place))
    with torch.no_grad():
        logits = model(inputs, decoder_input_ids=prompt).logits
    wanted = logits[:, place].softmax(-1)[:, 9]
    # On a GPU the second call replays what the first one recorded.
    for _ in range(2):
        decoded = engine.decode(engine.encode(inputs), prompt, request)
        torch.testing.assert_close(decoded.probe_probability, wanted, rtol=2e-3, atol=1e-6)


def test_a_temperature_flattens_what_is_drawn_and_not_what_is_told(model) -> None:
    engine = Engine.of(model)
    prompt = torch.tensor([[298, 5]]).expand(2, -1)
    states = engine.encode(features(2))
    drawn = []
    for temperature in (0.01, 3.0):
        torch.manual_seed(0)
        request = Request(
            LogitsProcessors(), 12, (), 0, sample=True, temperature=temperature, want_logprobs=True
        )
        drawn.append(engine.decode(states, prompt, request))
    best = engine.decode(states, prompt, Request(LogitsProcessors(), 12, (), 0, want_logprobs=True))
    assert torch.equal(drawn[0].sequences, best.sequences)
    torch.testing.assert_close(drawn[0].sum_logprobs, best.sum_logprobs)
    assert not torch.equal(drawn[1].sequences, best.sequences)


def replace_parameter(model: Any) -> None:
    layer = model.model.decoder.layers[0].fc1
    layer.weight = nn.Parameter(layer.weight.detach() * 2)


def replace_values(model: Any) -> None:
    layer = model.model.decoder.layers[1].self_attn.q_proj
    layer.weight.data = layer.weight.detach() * 2


def replace_module(model: Any) -> None:
    encoder = model.model.encoder
    encoder.layers[1] = copy.deepcopy(encoder.layers[0])


def load_other_tensors(model: Any) -> None:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def untie(model: Any) -> None:
    model.proj_out.weight = nn.Parameter(model.proj_out.weight.detach() * 2)


def transpose(model: Any) -> None:
    weight = model.model.decoder.layers[0].self_attn.q_proj.weight
    weight.data = weight.data.t()


def change_eps(model: Any) -> None:
    model.model.encoder.layer_norm.eps = 0.5


MOVES: dict[str, Callable[[Any], Any]] = {
    "half": lambda model: model.half(),
    "double": lambda model: model.to(torch.float64),
    "parameter": replace_parameter,
    "values": replace_values,
    "module": replace_module,
    "assign": load_other_tensors,
    "untied": untie,
    "transposed": transpose,
    "eps": change_eps,
}


@pytest.mark.parametrize("move", MOVES)
def test_a_model_that_moved_gets_another_engine(model, move: str) -> None:
    old = weakref.ref(Engine.of(model))
    answer(Engine.of(model))
    MOVES[move](model)
    new = Engine.of(model)
    gc.collect()
    assert old() is None
    assert Engine.of(model) is new
    assert new.weights.dtype is model.dtype
    check_same(answer(new), answer(Engine(collect_weights(copy.deepcopy(model)))))


def load_in_place(model: Any) -> None:
    other = perturbed(copy.deepcopy(model), seed=8)
    model.load_state_dict(other.state_dict())


def descend(model: Any) -> None:
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    for index, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(index)
        parameter.grad = 0.05 * torch.randn(parameter.shape, generator=generator)
    optimiser.step()


@pytest.mark.parametrize("change", [load_in_place, descend])
def test_values_that_changed_in_place_are_seen_by_the_same_engine(model, change: Any) -> None:
    engine = Engine.of(model)
    before = answer(engine)
    change(model)
    assert Engine.of(model) is engine
    after = answer(engine)
    assert not torch.equal(after[0], before[0])
    check_same(after, answer(Engine(collect_weights(copy.deepcopy(model)))))


def test_the_engine_goes_with_its_model(small_model: WhisperForConditionalGeneration) -> None:
    model = copy.deepcopy(small_model)
    engine = Engine.of(model)
    answer(engine)
    kept = weakref.ref(model), weakref.ref(engine), weakref.ref(engine._buffers._memory._arena)
    del engine, model
    gc.collect()
    assert [reference() for reference in kept] == [None] * 3


def test_the_engine_goes_with_a_model_that_generated() -> None:
    model = make_twins().ours
    for _ in range(2):
        model.generate(features(1)[:, :, :80], language="en", max_new_tokens=3)
    kept = weakref.ref(model), weakref.ref(Engine.of(model))
    del model
    gc.collect()
    assert [reference() for reference in kept] == [None] * 2


def test_forget(model) -> None:
    old = weakref.ref(Engine.of(model))
    Engine.forget(model)
    Engine.forget(model)
    gc.collect()
    assert old() is None
    assert model not in Engine._engines
    Engine.of(model)


def test_release_gives_the_buffers_back(model) -> None:
    engine = Engine.of(model)
    wanted = answer(engine)
    arena = weakref.ref(engine._buffers._memory._arena)
    engine.release()
    gc.collect()
    assert arena() is None
    assert Engine.of(model) is engine
    check_same(answer(engine), wanted)


def test_only_an_engine_that_is_there_is_released(model) -> None:
    Engine.forget(model)
    Engine.release_of(model)
    assert model not in Engine._engines
    answer(Engine.of(model))
    Engine.release_of(model)
    assert Engine.of(model)._buffers._memory._arena is None


def test_calls_of_mixed_sizes_share_the_memory_of_the_largest(model) -> None:
    engine = Engine.of(model)
    answer(engine, batch=3)
    arena = engine._buffers._memory._arena
    for batch in (1, 3, 2):
        check_same(
            answer(engine, batch, seed=batch),
            answer(Engine(collect_weights(model)), batch, seed=batch),
        )
        assert engine._buffers._memory._arena is arena
    answer(engine, batch=4)
    assert engine._buffers._memory._arena is not arena


@pytest.fixture
def eager_switches() -> Iterator[None]:
    """Threads that take turns as often as Python can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    """What the calls return, made in as many threads that start together."""
    barrier = threading.Barrier(len(calls), timeout=30)

    def run(call: Callable[[], Any]) -> Any:
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def test_threads_that_decode_at_once_get_their_own_answers(model, eager_switches: None) -> None:
    engine = Engine.of(model)
    wanted = [answer(engine, batch=1 + seed, seed=seed) for seed in range(3)]
    for _ in range(3):
        calls = [lambda seed=seed: answer(engine, 1 + seed, seed) for seed in range(3)]
        for found, expected in zip(at_once(calls), wanted, strict=True):
            check_same(found, expected)


def test_threads_that_ask_at_once_get_one_engine(model, eager_switches: None) -> None:
    engines = at_once([lambda: Engine.of(model)] * 4)
    assert len(set(map(id, engines))) == 1


def test_threads_that_generate_at_once_on_one_model(eager_switches: None) -> None:
    model = make_twins().ours
    clips = [
        torch.randn(2, 80, 80, generator=torch.Generator().manual_seed(seed)) for seed in range(2)
    ]
    options: list[dict[str, Any]] = [
        {"language": "en", "max_new_tokens": 12},
        {"language": "de", "max_new_tokens": 10, "num_beams": 2},
    ]
    calls = [
        lambda clip=clip, more=more: [model.generate(clip, **more) for _ in range(3)][-1]
        for clip, more in zip(clips, options, strict=True)
    ]
    wanted = [call() for call in calls]
    for found, expected in zip(at_once(calls), wanted, strict=True):
        assert torch.equal(found, expected)


class Halting(BaseStreamer):
    """Keeps a thread within `generate`, once it has its first tokens, until it may go on."""

    def __init__(self) -> None:
        self.halted = threading.Event()
        self.may_go_on = threading.Event()

    def put(self, tokens: torch.Tensor) -> None:
        self.halted.set()
        self.may_go_on.wait()

    def end(self) -> None: ...


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_while_another_thread_is_in_generate() -> None:
    """The child decodes at once, with the right ids: nothing there will release those locks."""
    model = make_twins().ours
    clip = torch.randn(2, 80, 80, generator=torch.Generator().manual_seed(1))
    options = {"language": "en", "max_new_tokens": 6}
    expected = model.generate(clip, **options)
    streamer = Halting()
    with ThreadPoolExecutor(2) as pool:
        halted = pool.submit(lambda: model.generate(clip, streamer=streamer, **options))
        try:
            assert streamer.halted.wait(60)
            assert pool.submit(Engine._registry_lock.acquire).result(60)
            with warnings.catch_warnings():
                # Python 3.12 warns that this may end in a deadlock: it must not.
                warnings.simplefilter("ignore", DeprecationWarning)
                child = os.fork()
            if child == 0:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(60)
                same = torch.equal(model.generate(clip, **options), expected)
                os._exit(0 if same else 1)
        finally:
            Engine._registry_lock.release()
            streamer.may_go_on.set()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert torch.equal(halted.result(60), expected)
