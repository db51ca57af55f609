"""The decoder on kernels and recordings gives what the plain decoder gives.

Without a GPU the kernels are interpreted, and passes that would be recorded are launched again as
they were the first time: a name that leaves out something on which a pass depends shows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable
from typing import Any

import pytest
import torch
from transformers import WhisperForConditionalGeneration

from whisper_flash_attention.engine import beam, cuda_decoder, triton_layers
from whisper_flash_attention.engine import engine as engine_module
from whisper_flash_attention.engine import layout as layouts
from whisper_flash_attention.engine.cuda_decoder import CudaDecoder
from whisper_flash_attention.engine.cuda_graphs import GraphCache, GraphRecorder
from whisper_flash_attention.engine.engine import Engine
from whisper_flash_attention.engine.layout import Arena, DecodeState, Layout, state_bytes
from whisper_flash_attention.engine.logits_processors import (
    LogitsProcessors,
    MinLength,
    Suppress,
    SuppressAtBegin,
    Timestamps,
)
from whisper_flash_attention.engine.request import Beams, DecodeOutput, Request
from whisper_flash_attention.engine.sampling import choose_tokens
from whisper_flash_attention.engine.torch_decoder import TorchDecoder
from whisper_flash_attention.engine.triton_layers import RECORDED_CLIPS, Workspace, workspace_bytes
from whisper_flash_attention.engine.weights import DecoderWeights, collect_weights
from whisper_flash_attention.errors import NotFinite
from whisper_flash_attention.kernels import (
    absorbed_projections,
    launch,
    layer_norm,
    linear,
    logits,
    matmul,
)
from whisper_flash_attention.kernels.launch import interpreted

pytestmark = pytest.mark.skipif(not interpreted(), reason="needs Triton's interpreter")
NAN = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
# 300 tokens, the last ones timestamps.
STAMPS, KEYS, WIDTH = 250, 12, 128
FORMS = pytest.mark.parametrize("absorbed", [False, True], ids=["projected", "absorbed"])


class Replayed(GraphCache):
    """Launches a pass again as it was launched the first time, and keeps what was requested."""

    def __init__(self, recorder: GraphRecorder | None = None) -> None:
        super().__init__(recorder or GraphRecorder())
        self.launches: dict[Hashable, Callable[[], None]] = {}
        self.keys: list[Any] = []

    def run(self, key: Hashable, launch: Callable[[], None]) -> None:
        self.keys.append(key)
        self.launches.setdefault(key, launch)()


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut matrices into large blocks: in the interpreter the number of programs is the time."""
    blocks = linear.Config("dot", 16, 128, 128)
    monkeypatch.setattr(linear, "choose", lambda *sizes, **options: blocks)
    columns = logits.Config("dot", 16, 128, 128, 4, 1)
    monkeypatch.setattr(logits, "choose", lambda *sizes: columns)
    query = absorbed_projections.QueryConfig(columns=64, chunk=128)
    monkeypatch.setattr(absorbed_projections, "choose_query_config", lambda *sizes: query)
    values = absorbed_projections.ValuesConfig(columns=64, chunk=128)
    monkeypatch.setattr(absorbed_projections, "choose_values_config", lambda *sizes: values)


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def weights(small_model: WhisperForConditionalGeneration) -> DecoderWeights:
    return collect_weights(small_model).decoder


def cut(layout: Layout) -> tuple[DecodeState, Arena]:
    """A state in memory that holds nothing but NaN and impossible numbers."""
    arena = Arena(layout.device, state_bytes(layout) + workspace_bytes(layout))
    arena._block.fill_(255)
    return DecodeState.allocate(layout, arena), arena


def on_kernels(weights: DecoderWeights, **sizes: Any) -> tuple[CudaDecoder, Replayed]:
    options = {"slots": 4, "positions": 16, "keys": KEYS, "kernels": True, "prompt": 2} | sizes
    layout = Layout.of(weights, clips=options["slots"], **options)
    state, arena = cut(layout)
    graphs = Replayed()
    decoder = CudaDecoder(weights, state, Workspace.allocate(layout, arena), graphs)
    decoder.prepare()
    return decoder, graphs


def plain(weights: DecoderWeights, batch: int, *, absorbed: bool) -> TorchDecoder:
    layout = Layout.of(
        weights, slots=batch, clips=batch, positions=16, keys=KEYS, absorbed=absorbed
    )
    return TorchDecoder(weights, cut(layout)[0])


def clips(batch: int, prompt: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Encoder states [B, S, D] and a prompt [B, P] of text tokens."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(batch, KEYS, WIDTH, generator=generator)
    return states, torch.randint(0, STAMPS - 10, (batch, prompt), generator=generator)


def expected(
    weights: DecoderWeights, inputs: tuple[torch.Tensor, torch.Tensor], request: Request, form: bool
) -> DecodeOutput:
    return choose_tokens(plain(weights, len(inputs[1]), absorbed=form), *inputs, request)


def check_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape and found.dtype is torch.float32
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("slots", [4, RECORDED_CLIPS + 1])
def test_a_kernel_writes_cross_keys_and_values(
    weights: DecoderWeights, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On hardware that has it; the interpreter runs it for these weights, too."""
    inputs = clips(3, 2)
    request = Request(LogitsProcessors(), 4, (), 0, want_logits=True)
    wanted = expected(weights, inputs, request, False)
    monkeypatch.setattr(triton_layers, "has_encoder_kernels", lambda device, dtype: True)
    monkeypatch.setattr(triton_layers, "fill_cross", None)
    overlaps = []

    def product(*arguments: Any) -> None:
        overlaps.append(launch._switches.overlap)
        matmul.matmul(*arguments)

    monkeypatch.setattr(triton_layers, "matmul", product)
    decoder, graphs = on_kernels(weights, absorbed=False, raw=True, slots=slots)
    found = choose_tokens(decoder, *inputs, request)
    assert torch.equal(found.sequences, wanted.sequences)
    assert len(overlaps) == 2 * len(weights.layers)
    # A pass that is recorded right after it ran must find the kernels that it loaded.
    launch.set_pdl(launch.Overlap.LATE)
    graphs.launches[graphs.keys[0]]()
    assert len(overlaps) == 2 * len(weights.layers) * (2 if slots <= RECORDED_CLIPS else 1)
    assert set(overlaps) == {launch.Overlap.NONE}
    for one, other in zip(found.logits or (), wanted.logits or (), strict=True):
        check_close(one, other)


@FORMS
def test_greedy_answers_under_masks(weights: DecoderWeights, absorbed: bool) -> None:
    """Three rows in four slots, of which one ends before the others."""
    inputs = clips(3, 2)
    free = expected(weights, inputs, Request(LogitsProcessors(), 6, (), 0), absorbed).sequences[
        :, 2:
    ]
    # The token that would come first is forbidden: of one row always, of the others at the start.
    end = int(free[2, 0])
    rules = LogitsProcessors(
        (
            Suppress((int(free[0, 0]), int(free[0, 1]))),
            SuppressAtBegin((int(free[1, 0]),), 2),
            MinLength(4, (end,)),
        )
    )
    masked = expected(weights, inputs, Request(rules, 6, (end,), 280), absorbed).sequences
    assert not (masked[:, 2] == free[:, 0]).any()
    end = int(masked[1, 4])
    assert end not in masked[0, 2:5] and end not in masked[2, 2:5]
    request = Request(rules, 6, (end,), 280)
    wanted = expected(weights, inputs, request, absorbed).sequences
    assert wanted[1, -1] == 280 != wanted[0, -1]
    decoder, graphs = on_kernels(weights, absorbed=absorbed)
    assert torch.equal(decoder.greedy(*inputs, request).sequences, wanted)
    assert graphs.keys == [("prompt", "greedy 280", 2), *[("step", 280)] * 3]
    state = decoder.state
    assert state.finished[3] and not state.failed[3] and state.sum_logprobs[3] == 0


def test_the_next_answer_has_other_rules_rows_and_padding(weights: DecoderWeights) -> None:
    decoder, graphs = on_kernels(weights, absorbed=False, slots=3)
    grammar = LogitsProcessors((Timestamps(STAMPS, 1, STAMPS - 2, STAMPS - 1, 20),))
    for batch, rules, pad in ((2, grammar, 280), (1, LogitsProcessors((Suppress((3,)),)), 281)):
        inputs = clips(batch, 1, seed=batch)
        request = Request(rules, 3, (), pad)
        wanted = expected(weights, inputs, request, False).sequences
        assert torch.equal(decoder.greedy(*inputs, request).sequences, wanted)
        assert (wanted[:, 1] >= STAMPS).all() == (rules is grammar)
    assert graphs.keys == [
        ("prompt", "greedy 280", 1),
        ("step", 280),
        ("prompt", "greedy 281", 1),
        ("step", 281),
    ]


@pytest.mark.parametrize(("absorbed", "slots"), [(False, RECORDED_CLIPS + 1), (True, 3)])
def test_logits_token_by_token(weights: DecoderWeights, absorbed: bool, slots: int) -> None:
    decoder, graphs = on_kernels(weights, absorbed=absorbed, slots=slots, raw=True)
    for batch, length in ((2, 1), (1, 2)):
        states, prompt = clips(batch, length, seed=batch)
        other = plain(weights, batch, absorbed=absorbed)
        check_close(decoder.start(states, prompt), other.start(states, prompt))
        tokens = torch.arange(batch) + 20
        check_close(decoder.advance(tokens), other.advance(tokens))
    step = ("step", "logits", False)
    assert graphs.keys == [("prompt", "logits", 1), step, ("prompt", "logits", 2), step]


@FORMS
def test_layer_norms_before_products_of_many_rows(
    weights: DecoderWeights, monkeypatch: pytest.MonkeyPatch, absorbed: bool
) -> None:
    """A wide decoder of many rows; of four here, which a prompt of two tokens has."""
    normed: list[int] = []

    def norm(x: torch.Tensor, *arguments: Any, **options: Any) -> None:
        normed.append(len(x))
        layer_norm.layer_norm(x, *arguments, **options)

    monkeypatch.setattr(triton_layers, "layer_norm", norm)
    monkeypatch.setattr(triton_layers, "NORM_WIDTH", WIDTH)
    monkeypatch.setattr(triton_layers, "NORM_ROWS", 4)
    monkeypatch.setattr(triton_layers, "ONE_KERNEL_WIDTH", 0)
    decoder, _ = on_kernels(weights, absorbed=absorbed, slots=2, raw=True)
    states, prompt = clips(2, 2)
    other = plain(weights, 2, absorbed=absorbed)
    check_close(decoder.start(states, prompt), other.start(states, prompt))
    check_close(decoder.advance(prompt[:, 0]), other.advance(prompt[:, 0]))
    assert normed == [4] * (3 * len(weights.layers))


@pytest.mark.parametrize(
    ("length", "place", "batch"),
    [
        (2, 0, 2),
        pytest.param(2, 1, 1, marks=pytest.mark.slow),
        (9, 5, 2),
    ],
)
def test_a_watched_token_is_as_likely_as_the_plain_decoder_says(
    weights: DecoderWeights, length: int, place: int, batch: int
) -> None:
    inputs = clips(batch, length)
    masks = LogitsProcessors((Suppress((11,)),))
    request = Request(masks, length + 2, (), 0, probe=(11, place))
    wanted = expected(weights, inputs, request, True)
    assert wanted.probe_probability is not None and wanted.probe_probability.shape == (batch,)
    prompt = length if length <= layouts.KERNEL_PROMPT_TOKENS else 1
    decoder, graphs = on_kernels(weights, absorbed=True, slots=3, prompt=prompt, raw=True)
    for _ in range(2):
        found = decoder.greedy(*inputs, request)
        assert torch.equal(found.sequences, wanted.sequences)
        check_close(found.probe_probability, wanted.probe_probability)  # type: ignore[arg-type]
    decoder.start(*inputs, request.probe)
    check_close(decoder.probe_probability, wanted.probe_probability)  # type: ignore[arg-type]
    # Another place is another recording, and none at all the one without.
    unwatched = decoder.greedy(*inputs, Request(masks, length + 2, (), 0))
    assert unwatched.probe_probability is None
    assert ("prompt", "greedy 0", 2, place) in graphs.keys or length > 2
    assert ("prompt", "greedy 0", 2) in graphs.keys or length > 2


def test_an_answer_that_is_over_at_once(weights: DecoderWeights) -> None:
    decoder, graphs = on_kernels(weights, absorbed=False, slots=2)
    inputs = clips(1, 2)
    first = int(
        expected(weights, inputs, Request(LogitsProcessors(), 3, (), 0), False).sequences[0, 2]
    )
    request = Request(LogitsProcessors(), 16, (7, first), 0)
    found = decoder.greedy(*inputs, request).sequences
    assert found.tolist() == [[*inputs[1][0].tolist(), first]]
    assert graphs.keys == [("prompt", "greedy 0", 2)]


@pytest.mark.parametrize(("length", "end", "steps"), [(4, None, 1), (6, 0, 0), (8, None, 5)])
def test_the_host_has_time_once_the_device_has_work(
    weights: DecoderWeights,
    monkeypatch: pytest.MonkeyPatch,
    length: int,
    end: int | None,
    steps: int,
) -> None:
    monkeypatch.setattr(cuda_decoder, "HEAD_START", 2)
    inputs = clips(1, 2)
    first = int(
        expected(weights, inputs, Request(LogitsProcessors(), 3, (), 0), True).sequences[0, 2]
    )
    decoder, graphs = on_kernels(weights, absorbed=True, slots=1)
    ends = (299,) if end is None else (first,)
    seen: list[int] = []
    request = Request(LogitsProcessors((Suppress((299,)),)), length, ends, 0)
    decoder.greedy(*inputs, request, lambda: seen.append(len(graphs.keys)))
    assert seen == [1 + min(steps, 2)]
    assert len(graphs.keys) == 1 + steps


@FORMS
def test_a_prompt_too_long_for_the_kernels(weights: DecoderWeights, absorbed: bool) -> None:
    length = layouts.KERNEL_PROMPT_TOKENS + 2
    inputs = clips(2, length)
    request = Request(LogitsProcessors((Suppress((3, 4)),)), length + 2, (), 0)
    wanted = expected(weights, inputs, request, absorbed).sequences
    decoder, graphs = on_kernels(weights, absorbed=absorbed, slots=3, prompt=1)
    assert torch.equal(decoder.greedy(*inputs, request).sequences, wanted)
    assert graphs.keys == [("long prompt", "greedy 0"), ("step", 0)]


def test_logits_after_a_prompt_too_long_for_the_kernels(weights: DecoderWeights) -> None:
    states, prompt = clips(1, layouts.KERNEL_PROMPT_TOKENS + 1)
    decoder, _ = on_kernels(weights, absorbed=True, slots=2, prompt=1, raw=True)
    other = plain(weights, 1, absorbed=True)
    check_close(decoder.start(states, prompt), other.start(states, prompt))
    check_close(decoder.advance(prompt[:, 0]), other.advance(prompt[:, 0]))


def test_beams(weights: DecoderWeights) -> None:
    beams = Beams(2, 2, 1.0, False, 4)
    request = Request(LogitsProcessors((Suppress((9,)),)), 6, (4,), 0, beams=beams)
    states, prompt = clips(1, 2, seed=3)
    found = []
    for kernels in (False, True):
        sizes = {"slots": 2, "clips": 1, "positions": 16, "keys": KEYS, "absorbed": False}
        layout = Layout.of(weights, **sizes, kernels=kernels, prompt=2, raw=True)
        state, arena = cut(layout)
        decoder: Any = TorchDecoder(weights, state)
        if kernels:
            decoder = CudaDecoder(weights, state, Workspace.allocate(layout, arena), Replayed())
            decoder.prepare()
        found.append(beam.search(decoder, states, prompt.expand(2, -1), request))
    assert torch.equal(found[1].sequences, found[0].sequences)
    assert torch.equal(found[1].beam_indices, found[0].beam_indices)
    # Some beam descends from another one's slot.
    assert (found[0].beam_indices[0] != found[0].beam_indices[0, 0]).any()
    torch.testing.assert_close(found[1].sequences_scores, found[0].sequences_scores)


@NAN
@pytest.mark.parametrize("where", ["states", "weights", "last row"])
def test_what_is_not_finite_is_an_error(weights: DecoderWeights, where: str) -> None:
    states, prompt = clips(2, 1)
    if where == "weights":
        weights = copy.deepcopy(weights)
        weights.layers[1].fc2.weight[5, 7] = math.nan
    else:
        states[1 if where == "last row" else slice(None), 3, 8] = math.nan
    decoder, _ = on_kernels(weights, absorbed=False, slots=2)
    rows = "1" if where == "last row" else "0, 1"
    with pytest.raises(NotFinite, match=f"not finite in row {rows} of"):
        decoder.greedy(states, prompt, Request(LogitsProcessors(), 2, (), 0))


@NAN
def test_the_next_answer_is_not_spoilt_by_an_error(weights: DecoderWeights) -> None:
    decoder, _ = on_kernels(weights, absorbed=False, slots=2)
    states, prompt = clips(2, 1)
    request = Request(LogitsProcessors(), 2, (), 0)
    with pytest.raises(NotFinite):
        decoder.greedy(states * math.nan, prompt, request)
    wanted = expected(weights, (states[:1], prompt[:1]), request, False).sequences
    assert torch.equal(decoder.greedy(states[:1], prompt[:1], request).sequences, wanted)


def test_the_engine_takes_this_path_where_there_are_kernels(
    small_model: WhisperForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    states, prompt = clips(1, 2)
    engine = Engine(collect_weights(small_model))
    # The larger buffers first: when they grow, decoders made before are dropped.
    requests = [
        Request(LogitsProcessors(), 4, (), 0, want_logits=True),
        Request(LogitsProcessors((Suppress((9,)),)), 4, (), 0),
    ]
    plain_answers = [engine.decode(states, prompt, request) for request in requests]
    monkeypatch.setattr(layouts, "has_kernels", lambda device: True)
    monkeypatch.setattr(engine_module, "GraphCache", Replayed)
    for request, wanted in zip(requests, plain_answers, strict=True):
        found = engine.decode(states, prompt, request)
        assert torch.equal(found.sequences, wanted.sequences)
        assert (found.logits is None) == (wanted.logits is None)
        for one, other in zip(found.logits or (), wanted.logits or (), strict=True):
            check_close(one, other)
    assert len(engine._buffers._decoders) == 2
