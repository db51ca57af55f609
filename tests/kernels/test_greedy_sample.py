"""Step by step, `logits` and `greedy_sample` choose what the logits processors and `argmax` do."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.kernels.partials import empty_partials
from whisper_flash_attention.engine import logits_processors
from whisper_flash_attention.engine.logits_processors import (
    History,
    LogitsProcessor,
    LogitsProcessors,
    MinLength,
    Suppress,
    SuppressAtBegin,
    Timestamps,
)
from whisper_flash_attention.errors import KernelShapeError
from whisper_flash_attention.kernels import greedy_sample as kernel
from whisper_flash_attention.kernels.greedy_sample import greedy_sample
from whisper_flash_attention.kernels.logits import Config, logits

VOCABULARY, STAMPS, EOS, PAD = 128, 70, 50, 51
WIDTH, CAPACITY = 128, 24
GEMV = Config("gemv", 1, 64, 128, 4, 1)
DOT = Config("dot", 16, 64, 128, 4, 2)
VARIANTS = pytest.mark.parametrize("config", [GEMV, DOT], ids=["gemv", "dot"])


def make_rules(
    begin: int, *, grammar: bool = True, least: int = 0, detect: bool = True
) -> LogitsProcessors:
    chain: list[LogitsProcessor] = [
        MinLength(least, (EOS,)),
        SuppressAtBegin((7, EOS), begin),
        Suppress((*range(EOS + 1, STAMPS - 1), 20)),
    ]
    if grammar:
        chain.append(Timestamps(STAMPS, begin, EOS, STAMPS - 1, 20, detect))
    return LogitsProcessors(tuple(chain))


class Slots:
    """A model whose logits are given: x picks a column of the table [V, D], one per call.

    Every step runs in the kernels and in `LogitsProcessors`; all results are compared.
    """

    def __init__(
        self,
        device: torch.device,
        prompts: list[list[int]],
        rules: list[LogitsProcessors],
        max_length: list[int],
        config: Config = GEMV,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self.slots = slots = len(prompts)
        self.device, self.dtype, self.rules, self.max_length = device, dtype, rules, max_length
        generator = torch.Generator().manual_seed(seed)
        self.words = torch.randn(VOCABULARY, WIDTH, generator=generator).to(device, dtype)
        self.seats = torch.randn(CAPACITY - 1, WIDTH, generator=generator).to(device, dtype)
        self.answers = [list(prompt) for prompt in prompts]
        self.logprobs = [0.0] * slots
        self.over = [False] * slots
        self.emitted = [-1] * slots
        self.output = torch.full((slots, CAPACITY), -7, device=device)
        for row, prompt in zip(self.output, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt, device=device)
        self.partials = empty_partials(slots, self.words, config)
        self.tokens = torch.full((slots,), -1, device=device)
        lasts = [len(prompt) - 1 for prompt in prompts]
        self.positions = torch.tensor(lasts, dtype=torch.int32, device=device)
        self.finished = torch.zeros(slots, dtype=torch.bool, device=device)
        self.failed = torch.zeros(slots, dtype=torch.bool, device=device)
        self.sums = torch.zeros(slots, device=device)
        self.x = torch.full((slots, WIDTH), math.nan, device=device, dtype=dtype)
        fused = [rule.kernel_processors for rule in rules]
        self.kernel_processors = [one for one in fused if one is not None]
        assert len(self.kernel_processors) == slots
        self.flags = self.kernel_processors[0].flags(VOCABULARY, (EOS,), device)
        self.limits = torch.cat([self.limit(slot) for slot in range(slots)])
        self.settings = torch.tensor(
            [
                one.settings(VOCABULARY, length)
                for one, length in zip(self.kernel_processors, max_length, strict=True)
            ],
            dtype=torch.int32,
            device=device,
        )

    def history(self, slot: int) -> History:
        tokens = torch.tensor([self.answers[slot]], device=self.device)
        return History(tokens, tokens.shape[1])

    def limit(self, slot: int) -> torch.Tensor:
        return self.kernel_processors[slot].limits(self.history(slot), VOCABULARY)

    def step(self, scores: torch.Tensor, tokens_per_slot: int = 1) -> None:
        """One step with these logits [B, V]."""
        rows = self.slots * tokens_per_slot
        x = torch.full((rows, WIDTH), 5.0, device=self.device, dtype=self.dtype)
        x[tokens_per_slot - 1 :: tokens_per_slot] = torch.eye(self.slots, WIDTH)
        table = torch.zeros(VOCABULARY, WIDTH, device=self.device, dtype=self.dtype)
        table[:, : self.slots] = scores.T
        logits(
            x,
            None,
            None,
            table,
            self.flags,
            self.limits,
            self.settings,
            self.partials,
            tokens_per_slot=tokens_per_slot,
        )
        self.sample(tokens_per_slot)
        for slot in range(self.slots):
            self.follow(slot, table[:, slot].float()[None])
        self.check()

    def sample(self, tokens_per_slot: int = 1, **changes: Any) -> None:
        arguments: dict[str, Any] = {
            "tokens": self.tokens,
            "output": self.output,
            "positions": self.positions,
            "finished": self.finished,
            "failed": self.failed,
            "sum_logprobs": self.sums,
            "embedding": self.words,
            "position_embedding": self.seats,
            "x": self.x,
            "pad": PAD,
            "tokens_per_slot": tokens_per_slot,
        }
        greedy_sample(self.partials, self.flags, self.limits, self.settings, **arguments | changes)

    def follow(self, slot: int, scores: torch.Tensor) -> None:
        """Take the step for one slot in plain PyTorch."""
        answer, room = self.answers[slot], self.max_length[slot]
        if self.over[slot]:
            answer += [PAD] * (len(answer) < room)
            self.emitted[slot] = PAD
            return
        processed = self.rules[slot].apply(scores, self.history(slot))
        token = int(processed.argmax())
        self.logprobs[slot] += float(processed.double().log_softmax(dim=-1)[0, token])
        answer.append(token)
        self.emitted[slot] = token
        self.over[slot] = token == EOS or len(answer) >= room

    def check(self) -> None:
        for slot, answer in enumerate(self.answers):
            count = len(answer)
            assert self.output[slot].tolist() == answer + [-7] * (CAPACITY - count)
            assert self.tokens[slot] == self.emitted[slot]
            assert self.positions[slot] == count - 1
            assert bool(self.finished[slot]) == self.over[slot]
            assert float(self.sums[slot]) == pytest.approx(self.logprobs[slot], rel=1e-4, abs=1e-4)
            word = self.words[self.tokens[slot]]
            expected = word + self.seats[min(count - 1, CAPACITY - 2)]
            assert torch.equal(self.x[slot], expected)
            if not self.over[slot]:
                assert torch.equal(self.limits[slot : slot + 1], self.limit(slot))
        assert not self.failed.any()


def random_scores(slots: int, generator: torch.Generator) -> torch.Tensor:
    """Logits with ties, in which text, timestamps and the end are likely by turns."""
    scores = (torch.randn(slots, VOCABULARY, generator=generator) * 4).round() / 4
    lead = torch.randint(-4, 3, (slots, 1), generator=generator).float()
    scores[:, STAMPS:] += lead
    scores[:, EOS] += 4 * (torch.rand(slots, generator=generator) < 0.1)
    # Some steps repeat the timestamp that is there, or go back behind it.
    scores[:, STAMPS + 3] += 4 * (torch.rand(slots, generator=generator) < 0.5)
    return scores


@pytest.mark.parametrize(
    ("config", "seed", "detect"),
    [(DOT, 0, True), (DOT, 1, True), (DOT, 2, False), (GEMV, 3, True)],
)
def test_whole_answers(device: torch.device, config: Config, seed: int, detect: bool) -> None:
    """Slots whose prompts, rules and lengths differ, through a dozen steps, past their ends."""
    rules = [
        make_rules(3, detect=detect),
        make_rules(5, detect=detect, least=9),
        # Flags are shared: this slot sees <|notimestamps|> marked, and may say it all the same.
        make_rules(2, grammar=False),
    ]
    prompts = [[1, 2, STAMPS + 9], [1, 2, 3, 4, 5], [1, STAMPS]]
    count = 3 if config is DOT else 1
    rooms = [14 if config is GEMV else 9, CAPACITY, 12][:count]
    slots = Slots(device, prompts[:count], rules[:count], rooms, config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(11):
        slots.step(random_scores(count, generator))


def test_answers_reach_every_state_of_the_grammar(device: torch.device) -> None:
    """A written walk: pair, text, pair, timestamps by their sum, the end, padding."""
    slots = Slots(device, [[1, 2]], [make_rules(2)], [12])

    def likely(*tokens: int) -> torch.Tensor:
        scores = torch.full((1, VOCABULARY), -20.0)
        scores[0, list(tokens)] = torch.linspace(5, 4, len(tokens))
        return scores

    stamp = STAMPS + 10
    slots.step(likely(7, STAMPS + 50, 5, stamp))
    slots.step(likely(stamp + 1, stamp, 30))
    slots.step(likely(EOS + 9, 31))
    slots.step(likely(32, stamp + 6, stamp + 7, stamp + 8))
    slots.step(likely(33, stamp + 5, stamp + 6))
    slots.step(likely(stamp + 7, 34))
    slots.step(likely(stamp + 6, EOS))
    slots.step(likely(35))
    answer = [stamp, 30, 31, stamp + 6, stamp + 6, 34, EOS, PAD]
    assert slots.answers[0] == [1, 2, *answer]


def test_a_special_token_after_an_opening_timestamp(device: torch.device) -> None:
    """Rare, but allowed if it is not suppressed; the timestamp may not be repeated after it."""
    grammar = Timestamps(STAMPS, 1, EOS, STAMPS - 1)
    slots = Slots(device, [[1]], [LogitsProcessors((grammar,))], [9])
    for token in (STAMPS + 3, 9, STAMPS + 4, EOS + 5, STAMPS + 4):
        scores = torch.zeros(1, VOCABULARY)
        scores[0, token] = 30.0
        slots.step(scores)
    assert slots.answers[0][1:5] == [STAMPS + 3, 9, STAMPS + 4, EOS + 5]
    assert slots.answers[0][5] != STAMPS + 4


@VARIANTS
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_prompt_of_several_tokens_in_one_pass(
    device: torch.device, config: Config, dtype: torch.dtype
) -> None:
    prompts = [[1, 2, 3], [4, 5, STAMPS + 2]]
    slots = Slots(device, prompts, [make_rules(3)] * 2, [9, 9], config, dtype, seed=2)
    slots.positions.zero_()
    generator = torch.Generator().manual_seed(4)
    slots.step(random_scores(2, generator), tokens_per_slot=3)
    for _ in range(3):
        slots.step(random_scores(2, generator))


def test_everything_forbidden_gives_token_0(device: torch.device) -> None:
    """As `torch.argmax` of nothing but minus infinity does; it is not a failure."""
    slots = Slots(device, [[1]], [make_rules(1)], [9])
    slots.flags[:] |= logits_processors.SUPPRESSED
    logits_of_zero(slots)
    slots.sample()
    assert slots.tokens.tolist() == [0] and not slots.failed.any()
    assert slots.sums.tolist() == [-math.inf]


def logits_of_zero(slots: Slots) -> None:
    logits(
        torch.zeros(slots.slots, WIDTH, device=slots.device),
        None,
        None,
        torch.zeros(VOCABULARY, WIDTH, device=slots.device),
        slots.flags,
        slots.limits,
        slots.settings,
        slots.partials,
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
def test_nan_fails_its_slot_only(device: torch.device) -> None:
    """NaN of text or of timestamps; in an ended slot it does not matter any more."""
    slots = Slots(device, [[1, 2]] * 4, [make_rules(2)] * 4, [9] * 4)
    slots.finished[2] = True
    logits_of_zero(slots)
    slots.partials.values[1, [0, 2], 0] = math.nan
    slots.partials.values[3, 3, 1] = math.nan
    slots.sample()
    assert slots.failed.tolist() == [True, False, False, True]
    slots.partials.values[:] = torch.tensor([1.0, 1.0, -math.inf, 0.0])[:, None, None]
    slots.partials.ids.zero_()
    slots.sample()
    assert slots.failed.tolist() == [True, False, False, True]


def test_a_slot_without_room_stays_where_it_is(device: torch.device) -> None:
    """Idle slots have settings of zeros; nothing may be written beyond a slot's own buffers."""
    slots = Slots(device, [[1] * CAPACITY, [1, 2]], [make_rules(2)] * 2, [CAPACITY, 9])
    slots.finished[:] = True
    slots.settings[1] = 0
    before = slots.output.clone()
    logits_of_zero(slots)
    slots.sample()
    assert torch.equal(slots.output, before)
    assert slots.positions.tolist() == [CAPACITY - 1, 0]
    assert slots.tokens.tolist() == [PAD, PAD] and slots.finished.all()
    assert torch.equal(slots.x, slots.words[PAD] + slots.seats[[CAPACITY - 2, 0]])


def test_the_bits_are_those_of_the_rules() -> None:
    for name in ("SUPPRESSED", "SUPPRESSED_AT_BEGIN", "WAITS_FOR_LENGTH", "NO_TIMESTAMPS", "ENDS"):
        assert getattr(kernel, name).value == getattr(logits_processors, name)


def test_misfits_are_refused(device: torch.device) -> None:
    slots = Slots(device, [[1]], [make_rules(1)], [9])
    with pytest.raises(KernelShapeError, match="do not fit"):
        slots.sample(pad=VOCABULARY)
    with pytest.raises(KernelShapeError, match="do not fit"):
        slots.sample(x=slots.x[:, :64])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 33, 128])
def test_many_slots(dtype: torch.dtype, count: int) -> None:
    prompts = [[1, 2, 3][: 1 + slot % 3] for slot in range(count)]
    rules = [make_rules(len(prompt), least=slot % 7) for slot, prompt in enumerate(prompts)]
    room = [6 + slot % 9 for slot in range(count)]
    slots = Slots(torch.device("cuda"), prompts, rules, room, DOT, dtype)
    generator = torch.Generator().manual_seed(count)
    for _ in range(14):
        slots.step(random_scores(count, generator))
