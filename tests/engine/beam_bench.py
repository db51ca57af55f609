"""What the tests of the beam search share: a model for both searches, and decoders with quirks."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, WhisperForConditionalGeneration

from whisper_flash_attention.engine import beam, encoder
from whisper_flash_attention.engine.cuda_graphs import GraphRecorder
from whisper_flash_attention.engine.engine import Buffers
from whisper_flash_attention.engine.layout import Layout, SharedArena
from whisper_flash_attention.engine.logits_processors import LogitsProcessors, NoRepeatNgram
from whisper_flash_attention.engine.request import Beams, DecodeOutput, Request
from whisper_flash_attention.engine.torch_decoder import TorchDecoder
from whisper_flash_attention.engine.weights import Weights, collect_weights
from whisper_flash_attention.hf.compat import SORTS_SAMPLED_BEAMS

CLIPS, LONGEST = 3, 16
PROMPT = (298, 12, 7)
PAD = 299


class Rounded(TorchDecoder):
    """Logits in steps of a half: many continuations tie."""

    def extend(self, tokens: torch.Tensor) -> torch.Tensor:
        return round_logits(super().extend(tokens))


class Flat(TorchDecoder):
    """All tokens are equally likely."""

    def extend(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().extend(tokens) * 0


class Reusing(TorchDecoder):
    """Overwrites its logits with those of the next pass, as the kernels do."""

    _place: torch.Tensor | None = None

    def extend(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = super().extend(tokens)
        if self._place is None:
            self._place = torch.empty_like(logits)
        return self._place.copy_(logits)


class Broken(TorchDecoder):
    """NaN in the logits of the second pass."""

    def advance(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = super().advance(tokens)
        logits[0, 5] = torch.nan
        return logits


def round_logits(logits: torch.Tensor) -> torch.Tensor:
    return (logits * 2).round() / 2


@dataclasses.dataclass(repr=False)
class Bench:
    """One model for both searches, in float64, so that both round to the same float32 logits.

    `likely` are tokens that searches without an end find, earliest first: taken as ends, they end
    rows.
    """

    stock: WhisperForConditionalGeneration
    rounded: WhisperForConditionalGeneration
    weights: Weights
    buffers: Buffers
    features: torch.Tensor
    states: torch.Tensor
    likely: list[int] = dataclasses.field(default_factory=list)

    def __repr__(self) -> str:
        return "bench"

    def search(
        self,
        request: Request,
        *,
        clips: int = CLIPS,
        searches: int = 1,
        prompt: tuple[int, ...] = PROMPT,
        decoder: type[TorchDecoder] = TorchDecoder,
        absorbed: bool = False,
    ) -> DecodeOutput:
        """The engine's answer for the first clips, with so many searches for each."""
        assert request.beams is not None
        rows = clips * searches * request.beams.num_beams
        layout = Layout.of(
            self.weights.decoder,
            slots=rows,
            clips=clips,
            positions=request.max_length,
            keys=self.states.shape[1],
            absorbed=absorbed,
        )
        state = self.buffers.state(layout)
        # What lies in the buffers from earlier decodes must not matter.
        state.ancestors.fill_(10**6)
        with torch.no_grad():
            return beam.search(
                decoder(self.weights.decoder, state),
                self.states[:clips],
                torch.tensor([prompt] * rows),
                request,
            )

    def expect(
        self,
        request: Request,
        *,
        clips: int = CLIPS,
        prompt: tuple[int, ...] = PROMPT,
        rounded: bool = False,
        **options: Any,
    ) -> Any:
        """Transformers' answer; `options` are those of `generate` that give the request's rules."""
        beams = request.beams
        assert beams is not None
        config = GenerationConfig(
            num_beams=beams.num_beams,
            num_return_sequences=beams.num_return_sequences,
            length_penalty=beams.length_penalty,
            early_stopping=beams.early_stopping,
            do_sample=request.sample,
            max_length=request.max_length,
            eos_token_id=list(request.eos) or None,
            pad_token_id=request.pad,
            decoder_start_token_id=PROMPT[0],
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
            **({"top_k": 0} | options),
        )
        return GenerationMixin.generate(
            self.rounded if rounded else self.stock,
            self.features[:clips],
            decoder_input_ids=torch.tensor([prompt] * clips),
            generation_config=config,
        )


def make_bench(small_model: WhisperForConditionalGeneration) -> Bench:
    """The bench for a model like `small_model`, which stays as it is."""
    stock = copy.deepcopy(small_model).double()
    stock.generation_config = GenerationConfig()
    rounded = copy.deepcopy(stock)
    rounded.proj_out.register_forward_hook(lambda _, __, logits: round_logits(logits.float()))
    weights = collect_weights(stock)
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(CLIPS, 80, 200, generator=generator).double()
    states = encoder.encode(weights.encoder, features)
    bench = Bench(
        stock,
        rounded,
        weights,
        Buffers(weights, GraphRecorder(), SharedArena(weights.device)),
        features,
        states,
    )
    found = bench.search(request_of(num_return_sequences=3, eos=(), rules=(NoRepeatNgram(1),)))
    bench.likely = list(dict.fromkeys(found.sequences[:, len(PROMPT) :].T.flatten().tolist()))
    assert len(bench.likely) > 8
    return bench


def request_of(
    *,
    num_beams: int = 3,
    num_return_sequences: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    eos: tuple[int, ...] = (PAD,),
    max_length: int = LONGEST,
    rules: tuple[Any, ...] = (),
    sample: bool = False,
) -> Request:
    return Request(
        processors=LogitsProcessors(rules),
        max_length=max_length,
        eos=eos,
        pad=PAD,
        sample=sample,
        beams=Beams(
            num_beams,
            num_return_sequences,
            length_penalty,
            early_stopping,
            num_beams * max(2, 1 + len(eos)),
            sort_sampled=SORTS_SAMPLED_BEAMS,
        ),
        want_scores=True,
        want_logits=True,
    )


def assert_same(found: DecodeOutput, expected: Any) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    assert found.beam_indices is not None and found.beam_indices.dtype == torch.int32
    assert torch.equal(found.beam_indices, expected.beam_indices)
    torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, rtol=1e-6, atol=0)
    for ours, stock in ((found.scores, expected.scores), (found.logits, expected.logits)):
        assert ours is not None and len(ours) == len(stock)
        for one, other in zip(ours, stock, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
