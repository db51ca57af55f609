"""Which path, which form of cross-attention and which sizes of buffers a decode gets."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperForConditionalGeneration

from whisper_flash_attention.engine import layout as layouts
from whisper_flash_attention.engine.layout import (
    ABSORBED_FROM_CLIPS,
    ALIGNMENT,
    BATCH_BUCKETS,
    KERNEL_PROMPT_ROWS,
    KERNEL_PROMPT_TOKENS,
    LENGTH_BUCKET,
    Arena,
    DecodeState,
    Layout,
    Sizes,
    Spec,
    backend_name,
    buffers,
    has_kernels,
    is_absorbed_faster,
    layout_for,
    make_layout,
    state_bytes,
)
from whisper_flash_attention.engine.logits_processors import (
    LogitsProcessors,
    NoRepeatNgram,
    Suppress,
)
from whisper_flash_attention.engine.memory_plan import kernel_bytes
from whisper_flash_attention.engine.request import Beams, Request
from whisper_flash_attention.engine.weights import DecoderWeights, collect_weights

KEYS = 100


@pytest.fixture(scope="module")
def weights(small_model: WhisperForConditionalGeneration) -> DecoderWeights:
    return collect_weights(small_model).decoder


def sizes_of(**changes: Any) -> Sizes:
    few = Sizes(clips=2, slots=2, keys=KEYS, prompt=4, max_length=30, raw=False, kernels=False)
    return replace(few, **changes)


@st.composite
def any_sizes(draw: st.DrawFn, most_clips: int = 700) -> Sizes:
    clips = draw(st.integers(1, most_clips))
    prompt = draw(st.integers(1, 40))
    return Sizes(
        clips=clips,
        slots=clips * draw(st.integers(1, 6)),
        keys=KEYS,
        prompt=prompt,
        max_length=prompt + draw(st.integers(1, 400)),
        raw=draw(st.booleans()),
        kernels=draw(st.booleans()),
    )


def request(**changes: Any) -> Request:
    options: dict[str, Any] = {
        "processors": LogitsProcessors(),
        "max_length": 30,
        "eos": (1,),
        "pad": 1,
    }
    return Request(**(options | changes))


@settings(deadline=None)
@given(sizes=any_sizes(), absorbed=st.booleans())
def test_a_layout_has_room_for_what_is_decoded(
    weights: DecoderWeights, sizes: Sizes, absorbed: bool
) -> None:
    layout = make_layout(weights, sizes, absorbed=absorbed)
    assert (layout.absorbed, layout.keys, layout.kernels) == (absorbed, KEYS, sizes.kernels)
    # Row r belongs to clip r // (slots per clip), in the layout as in the prompt.
    assert layout.slots == layout.clips * (sizes.slots // sizes.clips)
    if not sizes.kernels:
        assert (layout.clips, layout.positions) == (sizes.clips, sizes.max_length)
        assert (layout.prompt, layout.raw) == (1, False)
        return
    assert layout.raw == sizes.raw
    # Rounded up to the sizes of a few graphs: the smallest with room.
    if sizes.clips <= BATCH_BUCKETS[-1]:
        assert layout.clips == min(size for size in BATCH_BUCKETS if size >= sizes.clips)
    else:
        assert layout.clips % 64 == 0 and 0 <= layout.clips - sizes.clips < 64
    assert layout.positions % LENGTH_BUCKET == 0
    assert 0 <= layout.positions - sizes.max_length < LENGTH_BUCKET
    rows = sizes.prompt * layout.slots
    in_kernels = sizes.prompt <= KERNEL_PROMPT_TOKENS and rows <= KERNEL_PROMPT_ROWS
    assert layout.prompt == (sizes.prompt if in_kernels else 1)
    # Whatever has the same layout shares its recordings, the layout's own sizes too.
    full = replace(sizes, clips=layout.clips, slots=layout.slots, max_length=layout.positions)
    assert make_layout(weights, full, absorbed=absorbed) == layout


@settings(deadline=None)
@given(sizes=any_sizes(most_clips=9), absorbed=st.booleans())
def test_what_is_counted_is_what_is_cut(
    weights: DecoderWeights, sizes: Sizes, absorbed: bool
) -> None:
    layout = make_layout(weights, replace(sizes, max_length=50, prompt=4), absorbed=absorbed)
    counted = state_bytes(layout) + kernel_bytes(layout)
    arena = Arena(torch.device("cpu"), counted)
    tensors = cut_all(layout, arena)
    wanted = buffers(layout) | {
        f"work {name}": spec for name, spec in kernel_buffers(layout).items()
    }
    assert [(tuple(each.shape), each.dtype) for each in tensors] == list(wanted.values())
    places = sorted((each.data_ptr(), each.data_ptr() + each.nbytes) for each in tensors)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(places))
    assert places[-1][1] - places[0][0] <= counted < places[-1][1] - places[0][0] + ALIGNMENT
    with pytest.raises(RuntimeError):
        cut_all(layout, Arena(torch.device("cpu"), counted - ALIGNMENT))


def kernel_buffers(layout: Layout) -> dict[str, Spec]:
    """What the kernels need beside the state."""
    if not layout.kernels:
        return {}
    from whisper_flash_attention.engine.triton_layers import workspace_buffers

    return workspace_buffers(layout)


def cut_all(layout: Layout, arena: Arena) -> list[torch.Tensor]:
    """All buffers of a layout, as the engine cuts them."""
    state = vars(DecodeState.allocate(layout, arena))
    tensors = [state[name] for name in buffers(layout)]
    if layout.kernels:
        from whisper_flash_attention.engine.triton_layers import Workspace

        work = vars(Workspace.allocate(layout, arena))
        tensors += [work[name] for name in kernel_buffers(layout)]
    return tensors


@pytest.mark.parametrize(
    ("clips", "prompt", "expected"), [(128, 8, 8), (160, 8, 1), (1, 9, 1), (256, 4, 4)]
)
def test_the_kernels_take_prompts_of_few_rows(
    weights: DecoderWeights, clips: int, prompt: int, expected: int
) -> None:
    sizes = sizes_of(clips=clips, slots=clips, prompt=prompt, kernels=True)
    assert make_layout(weights, sizes, absorbed=True).prompt == expected


def test_only_kernels_have_workspaces(weights: DecoderWeights) -> None:
    plain = make_layout(weights, sizes_of(), absorbed=False)
    assert kernel_bytes(plain) == 0
    fused = make_layout(weights, sizes_of(kernels=True), absorbed=False)
    raw = make_layout(weights, sizes_of(kernels=True, raw=True), absorbed=False)
    # Stored logits: float32 for each of 300 tokens.
    assert kernel_bytes(raw) - kernel_bytes(fused) == -(-2 * 300 * 4 // ALIGNMENT) * ALIGNMENT


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("form", ["auto", "projected", "absorbed"])
@pytest.mark.parametrize("clips", [1, ABSORBED_FROM_CLIPS - 1, ABSORBED_FROM_CLIPS, 200])
def test_auto_takes_the_form_that_is_faster_at_this_batch(
    weights: DecoderWeights,
    monkeypatch: pytest.MonkeyPatch,
    clips: int,
    form: str,
    kernels: bool,
) -> None:
    monkeypatch.setattr(layouts, "has_kernels", lambda device: kernels)
    states = torch.empty(clips, KEYS, 128, device="meta")
    prompt = torch.empty(2 * clips, 3, dtype=torch.int64, device="meta")
    layout = layout_for(weights, states, prompt, request(cross_attention=form))
    faster = kernels and clips >= ABSORBED_FROM_CLIPS
    assert layout.absorbed == {"auto": faster, "projected": False, "absorbed": True}[form]
    assert layout.slots == 2 * layout.clips
    # Beams share their clip's states: they do not count.
    assert is_absorbed_faster(sizes_of(clips=clips, slots=5 * clips, kernels=kernels)) == faster


def test_sizes_are_those_of_states_prompt_and_request() -> None:
    states, prompt = torch.empty(3, KEYS, 128), torch.empty(6, 5, dtype=torch.int64)
    found = Sizes.of(torch.device("cpu"), states, prompt, request(max_length=77))
    assert found == Sizes(
        clips=3, slots=6, keys=KEYS, prompt=5, max_length=77, raw=False, kernels=False
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"sample": True},
        {"beams": Beams(2, 1, 1.0, False, 4)},
        {"want_scores": True},
        {"want_logits": True},
        {"on_token": lambda tokens: None},
        {"processors": LogitsProcessors((NoRepeatNgram(2),))},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_the_kernels_cannot_choose_needs_the_logits(changes: dict[str, Any]) -> None:
    states, prompt = torch.empty(3, KEYS, 128), torch.empty(6, 5, dtype=torch.int64)
    device = torch.device("cpu")
    assert Sizes.of(device, states, prompt, request(**changes)).raw
    assert not Sizes.of(
        device, states, prompt, request(processors=LogitsProcessors((Suppress((3,)),)))
    ).raw


@pytest.mark.parametrize(
    ("device", "capability", "hip", "triton", "expected"),
    [
        ("cuda", (8, 0), None, True, True),
        ("cuda", (9, 0), None, True, True),
        ("cuda", (7, 5), None, True, False),
        ("cuda", (9, 0), "6.4", True, False),
        ("cuda", (9, 0), None, False, False),
        ("cpu", (9, 0), None, True, False),
    ],
)
def test_kernels_need_nvidia_ampere_and_triton(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    capability: tuple[int, int],
    hip: str | None,
    triton: bool,
    expected: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    if not triton:
        monkeypatch.setitem(sys.modules, "triton", None)
    assert has_kernels.__wrapped__(torch.device(device)) is expected
    assert backend_name(torch.device(device)) == ("Triton kernels" if expected else "PyTorch")
