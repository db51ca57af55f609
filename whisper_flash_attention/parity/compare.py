"""The comparison: every recording in every mode, by both models, and the causes of differences.

Whether a difference is a near-tie is decided by the scores of the reference, or of float32 stock,
never by ours, so that a broken model cannot explain its own errors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.console import Console
from transformers import LogitsProcessor

from whisper_flash_attention.errors import DeviceError, UnsupportedAttention
from whisper_flash_attention.parity.cases import Clip, Mode, ParityOptions
from whisper_flash_attention.parity.models import (
    Ids,
    Models,
    ScoreRecorder,
    decode,
    log_probabilities,
    scores_after,
)
from whisper_flash_attention.terminal import FileProgress

LIKELIEST = 10


@dataclass(frozen=True, slots=True)
class Tie:
    """How close a choice was.

    Attributes:
        gap: change of scores that leads to the other choice, in logits; for beams in summed
            log-probabilities, for samples in log-probabilities over the temperature. Infinity if
            the reference forbids it.
        bound: the gap that the dtype's error explains, in the same unit.
        what: which two things are compared.
    """

    gap: float
    bound: float
    what: str

    @property
    def explained(self) -> bool:
        """Whether it was a near-tie. A gap that is not a number never is."""
        return self.gap <= self.bound


def shortfall(scores: torch.Tensor, token: int, first_timestamp: int | None) -> float:
    """The distance of `token` from being chosen, in the unit of the scores.

    It is twice the least e such that errors of the scores of up to e lead to its choice.

    Args:
        scores: `[vocabulary]`, minus infinity for forbidden tokens.
        token: the id in question.
        first_timestamp: id of the first timestamp where timestamps are decoded: they are chosen if,
            together, they are likelier than the best text token (Radford et al., 2022, section 4.5,
            and OpenAI's `ApplyTimestampRules`). None without timestamps.
    """
    if not math.isfinite(scores[token]):
        return math.inf
    if first_timestamp is None:
        return float(scores.max() - scores[token])
    wanted = scores[token]
    best_text, timestamps = scores[:first_timestamp].max(), scores[first_timestamp:]
    if token < first_timestamp:
        missing = (best_text - wanted, timestamps.logsumexp(0) - wanted)
    else:
        # If the scores of all timestamps rise, none of them may exceed this one.
        missing = (timestamps.max() - wanted, best_text - timestamps.clamp(max=wanted).logsumexp(0))
    return max(0.0, *map(float, missing))


def deviation(scores: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest error in the distance between the likeliest token and the nine after it, in logits.

    Args:
        scores, truth: `[vocabulary]`; "likeliest" is by `truth`.
    """
    best = truth.topk(LIKELIEST)
    error = (scores - truth)[best.indices[best.values.isfinite()]]
    return float((error - error[0]).abs().max())


@dataclass
class Judge:
    """Explains differences between ours and stock, one recording at a time.

    Args:
        models: the models that are compared.
        bound: gap in logits that explains a difference.
        seed: with which samples were drawn.
        fixed: whether only `bound` counts, and not the reference's own error at the position.
    """

    models: Models
    bound: float
    seed: int = 0
    fixed: bool = False

    def next_token(
        self,
        features: torch.Tensor,
        mode: Mode,
        language: str | None,
        prefix: Sequence[int],
        tokens: tuple[int, int],
    ) -> Tie:
        """Compare two tokens (the reference's, ours) after the same prefix.

        Both must be within the bound of being chosen by float32 stock. In half precision the bound
        is at least twice the error that stock itself makes there against float32.
        """

        def scores(model: Any) -> torch.Tensor:
            return scores_after(model, features, mode, prefix, language=language)[0]

        first = self.models.first_timestamp if mode.has_timestamps else None
        return self.judge(scores, tokens, first, "next token")

    def language(self, features: torch.Tensor, tokens: tuple[int, int]) -> Tie:
        """Compare two detected languages: token ids, the reference's and ours."""
        known = torch.tensor(sorted(self.models.language_ids.values()))

        def scores(model: Any) -> torch.Tensor:
            start = [int(model.generation_config.decoder_start_token_id)]
            found = log_probabilities(model, features, start, [0])[0].cpu()
            return torch.full_like(found, -torch.inf).index_copy(0, known, found[known])

        return self.judge(scores, tokens, None, "language")

    def judge(
        self, scores: Any, tokens: tuple[int, int], first_timestamp: int | None, what: str
    ) -> Tie:
        """Compare by `scores(model)`, a function that gives `[vocabulary]` of a stock model."""
        truth, bound = scores(self.models.float32 or self.models.stock), self.bound
        if self.models.float32 is not None and not self.fixed:
            bound = max(bound, 2 * deviation(scores(self.models.stock), truth))
        gap = max(shortfall(truth, token, first_timestamp) for token in tokens)
        return Tie(gap, bound, what)

    def draw(
        self,
        features: torch.Tensor,
        mode: Mode,
        language: str | None,
        prefix: Sequence[int],
        tokens: tuple[int, int],
    ) -> Tie:
        """Compare two outcomes of a random draw.

        PyTorch draws one of several on a CPU by the largest p / q, q from the exponential
        distribution (`aten/src/ATen/native/Distributions.cpp`): log p - log q is the score of an
        outcome.
        """
        scores, state = scores_after(
            self.models.stock, features, mode, prefix, language=language, seed=self.seed
        )
        generator = torch.Generator()
        generator.set_state(state)
        chances = scores.softmax(-1)[None]
        drawn = torch.empty_like(chances).exponential_(1, generator=generator)[0]
        keys = scores.log_softmax(-1) - drawn.log()
        return Tie(max(shortfall(keys, token, None) for token in tokens), self.bound, "draw")

    def beams(
        self,
        features: torch.Tensor,
        mode: Mode,
        language: str | None,
        prompt: Sequence[int],
        sequences: tuple[Ids, Ids],
    ) -> Tie:
        """Compare two results of a beam search: the reference's and ours, without the prompt.

        If the reference dropped ours on the way, the gap is its distance to the worst beam; else it
        is the difference of the final scores, times our length. Errors of n tokens are independent:
        the bound grows by sqrt(n).
        """
        chosen, ours = (self._ended(prompt, ids) for ids in sequences)
        trace = BeamTrace(ours)
        stock = self.models.stock
        decode(stock, features, mode, language=language, seed=self.seed, processor=trace)
        if trace.dropped_at is not None:
            what = f"our beam, dropped at token {trace.dropped_at}"
            return Tie(trace.missing, self.bound * math.sqrt(trace.dropped_at), what)
        better, worse = (self._score(features, prompt, ids) for ids in (chosen, ours))
        gap = max((better - worse) * len(ours), trace.missing_at_end, 0.0)
        return Tie(gap, self.bound * math.sqrt(len(ours)), "score of the sequence")

    def _ended(self, prompt: Sequence[int], ids: Ids) -> Ids:
        """With the end of text, unless the maximum length ended it."""
        room = self.models.longest - len(prompt)
        return [*ids, self.end_of_text] if len(ids) < room else ids

    def _score(self, features: torch.Tensor, prompt: Sequence[int], ids: Ids) -> float:
        """Summed log-probability over length to the power of the length penalty."""
        table = log_probabilities(self.models.stock, features, prompt, ids).cpu()
        penalty = self.models.stock.generation_config.length_penalty
        total = float(table.gather(1, torch.tensor(ids)[:, None]).sum())
        return total / float(len(ids) ** (1.0 if penalty is None else penalty))

    @property
    def end_of_text(self) -> int:
        """The id that ends a text."""
        end = self.models.stock.generation_config.eos_token_id
        return int(end[0] if isinstance(end, list) else end)


class BeamTrace(LogitsProcessor):
    """Follows one sequence through a beam search of one recording, without changing scores.

    Args:
        target: the sequence after the prompt, with its end of text.

    Attributes:
        dropped_at: number of its tokens that the search had chosen when no beam began with them any
            more; None if it remained among the beams.
        missing: distance of the summed log-probability of those tokens to the worst beam.
        missing_at_end: distance, with its last token, to the worst candidate for a beam.
    """

    def __init__(self, target: Sequence[int]) -> None:
        self.target = tuple(target)
        self.dropped_at: int | None = None
        self.missing = math.nan
        self.missing_at_end = 0.0
        self._prompt_length: int | None = None
        self._totals: dict[tuple[int, ...], float] = {(): 0.0}
        self._last: dict[tuple[int, ...], torch.Tensor] = {}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._prompt_length is None:
            self._prompt_length = input_ids.shape[1]
        step = input_ids.shape[1] - self._prompt_length
        if self.dropped_at is not None or step >= len(self.target):
            return scores
        rows = [tuple(row) for row in input_ids[:, self._prompt_length :].tolist()]
        if step:
            self._extend(rows)
        self._last = dict(zip(rows, scores.float().cpu(), strict=True))
        if self.target[:step] not in self._totals:
            self.dropped_at = step
            self.missing = min(self._totals.values()) - self._candidate
            return scores
        self._look_ahead(step, beams=len(rows))
        return scores

    def _extend(self, rows: list[tuple[int, ...]]) -> None:
        """Add the log-probability of each beam's last token to its sum."""
        self._totals = {
            row: self._totals[row[:-1]] + float(self._last[row[:-1]][row[-1]]) for row in rows
        }

    def _look_ahead(self, step: int, beams: int) -> None:
        """Compute the sequence's sum with its next token, and its distance at the end."""
        prefix, token = self.target[:step], self.target[step]
        self._candidate = self._totals[prefix] + float(self._last[prefix][token])
        if step == len(self.target) - 1:
            best = torch.cat(
                [total + self._last[row].topk(beams).values for row, total in self._totals.items()]
            )
            worst = float(best.topk(beams).values[-1])
            self.missing_at_end = max(0.0, worst - self._candidate)


IDENTICAL, EXPLAINED, UNEXPLAINED, FAILED = "identical", "explained", "unexplained", "failed"
LANGUAGE = "language"


@dataclass
class Row:
    """One recording in one mode.

    Attributes:
        mode: a name in `MODES`, or "language" for its detection.
        recording: the clip's name.
        status: "identical", "explained", "unexplained" or "failed".
        reference, ours: ids after the prompt, without the end of text; of a language, its token.
        position: index of the first id that differs, None if none does.
        tokens: the two ids there, the reference's first; the end of text where a side stopped.
        tie: how close the reference was to choosing ours.
        smallest_gap: smallest distance between the reference's two best scores, in greedy modes.
        float32: ids of stock in float32, where the dtype is another.
        failure: the reason of a status "failed".
    """

    mode: str
    recording: str
    status: str
    reference: Ids
    ours: Ids
    position: int | None = None
    tokens: tuple[int, int] | None = None
    tie: Tie | None = None
    smallest_gap: float | None = None
    float32: Ids | None = None
    failure: str | None = None


@dataclass
class Outcome:
    """The results of a comparison.

    Attributes:
        rows: by mode and recording, in the order in which they ran.
        not_comparable: why a mode was not run, by name.
        logit_errors: by recording, the largest difference between our log-probabilities and
            stock's, over all tokens and all positions of stock's text.
        languages: code by recording, as passed to both models.
    """

    rows: list[Row] = field(default_factory=list)
    not_comparable: dict[str, str] = field(default_factory=dict)
    logit_errors: dict[str, float] = field(default_factory=dict)
    languages: dict[str, str | None] = field(default_factory=dict)

    @property
    def is_good(self) -> bool:
        """Whether every difference is explained and nothing failed."""
        return all(row.status in (IDENTICAL, EXPLAINED) for row in self.rows)


def compare(
    models: Models, clips: Sequence[Clip], options: ParityOptions, console: Console
) -> Outcome:
    """Run all modes on all clips; progress goes to `console`.

    TensorFloat-32, which PyTorch allows in cuDNN's convolutions, is off for all models.

    Raises:
        DeviceError: the device's memory is too small.
        UnsupportedAttention: the requested back-end cannot run this model here.
    """
    cudnn = torch.backends.cudnn
    try:
        with cudnn.flags(enabled=cudnn.enabled, allow_tf32=False):
            return _Comparison(models, options, console).run(clips)
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            f"out of memory on {models.device} with {options.batch_size} recordings at once; "
            "give a smaller --batch-size"
        ) from error


class _Comparison:
    """One run; see `compare`."""

    def __init__(self, models: Models, options: ParityOptions, console: Console) -> None:
        self.models = models
        self.options = options
        self.console = console
        bound = options.bound(models.dtype_name)
        fixed = options.tolerance is not None
        self.judge = Judge(models, bound, seed=options.seed, fixed=fixed)
        self.outcome = Outcome()

    def run(self, clips: Sequence[Clip]) -> Outcome:
        self._find_languages(clips)
        jobs: list[tuple[Mode, list[Clip]]] = []
        for mode in self.options.chosen_modes():
            reason = self._why_not(mode)
            if reason:
                self.outcome.not_comparable[mode.name] = reason
            else:
                jobs += [(mode, batch) for batch in self._batches(clips, mode)]
        labels = [_label(mode.name, batch) for mode, batch in jobs]
        with FileProgress(self.console, labels) as progress:
            for label, (mode, batch) in zip(labels, jobs, strict=True):
                progress.begin(label)
                self._run_batch(batch, mode)
        return self.outcome

    def _why_not(self, mode: Mode) -> str | None:
        """Why random draws of two models cannot be equal here; None if they can."""
        on_cpu = self.models.device.type == "cpu" and self.models.dtype_name == "float32"
        if "temperature" not in mode.options or on_cpu:
            return None
        return "draws are the same in float32 on a CPU only"

    def _find_languages(self, clips: Sequence[Clip]) -> None:
        """Determine each clip's language, and compare the two detections."""
        wanted = self.options.language
        known = self.models.language_ids
        if not known or wanted != "auto":
            self.outcome.languages = {clip.name: wanted if known else None for clip in clips}
            return
        codes = {number: code for code, number in known.items()}
        batches = _chunks(clips, self.options.batch_size)
        labels = [_label(LANGUAGE, batch) for batch in batches]
        with FileProgress(self.console, labels) as progress:
            for label, batch in zip(labels, batches, strict=True):
                progress.begin(label)
                self._detect(batch, codes)

    def _detect(self, batch: Sequence[Clip], codes: dict[int, str]) -> None:
        features = self._features(batch)
        found = [
            model.detect_language(features.to(model.dtype)).tolist()
            for model in (self.models.stock, self.models.ours)
        ]
        for clip, reference, ours in zip(batch, *found, strict=True):
            self.outcome.languages[clip.name] = codes.get(reference)
            row = Row(LANGUAGE, clip.name, IDENTICAL, [reference], [ours])
            if reference not in codes:
                row.status, row.failure = FAILED, f"stock detects token {reference}: no language"
            elif reference != ours:
                row.position, row.tokens = 0, (reference, ours)
                row.tie = self.judge.language(self._features([clip]), row.tokens)
                row.status = EXPLAINED if row.tie.explained else UNEXPLAINED
            self.outcome.rows.append(row)

    def _batches(self, clips: Sequence[Clip], mode: Mode) -> list[list[Clip]]:
        """Batches of one language each."""
        size = 1 if "temperature" in mode.options else self.options.batch_size
        by_language: dict[str | None, list[Clip]] = {}
        for clip in clips:
            by_language.setdefault(self.outcome.languages[clip.name], []).append(clip)
        return [chunk for group in by_language.values() for chunk in _chunks(group, size)]

    def _features(self, batch: Sequence[Clip]) -> torch.Tensor:
        """`[len(batch), mel bins, frames]`, float32, on the device."""
        stacked = torch.stack([torch.from_numpy(clip.features) for clip in batch])
        return stacked.to(self.models.device)

    def _run_batch(self, batch: Sequence[Clip], mode: Mode) -> None:
        features = self._features(batch)
        language = self.outcome.languages[batch[0].name]
        options: dict[str, Any] = {"language": language, "seed": self.options.seed}
        recorder = ScoreRecorder()
        found: dict[str, list[Ids]] = {}
        for name, model in self.models.by_name().items():
            processor = recorder if name == "stock" else None
            try:
                found[name] = decode(model, features, mode, processor=processor, **options)
            except (UnsupportedAttention, torch.OutOfMemoryError):
                raise
            except Exception as error:
                failure = f"{name} raised {type(error).__name__}: {error}"
                rows = [Row(mode.name, clip.name, FAILED, [], []) for clip in batch]
                self.outcome.rows += [replace(row, failure=failure) for row in rows]
                return
        for index, clip in enumerate(batch):
            ids = {name: rows[index] for name, rows in found.items()}
            row = Row(mode.name, clip.name, IDENTICAL, ids["stock"], ids["ours"])
            row.float32 = ids.get("float32")
            self._judge(row, features[index : index + 1], mode, recorder)
            if mode.beams == 1 and "temperature" not in mode.options:
                steps = recorder.gaps[: len(row.reference) + 1]
                row.smallest_gap = min(float(gap[index]) for gap in steps)
            self.outcome.rows.append(row)

    def _judge(self, row: Row, features: torch.Tensor, mode: Mode, recorder: ScoreRecorder) -> None:
        """Remove the prompt, find the first difference, and explain it."""
        if not self._without_prompt(row, recorder.prompt):
            row.status, row.failure = (
                FAILED,
                "our ids do not begin with the prompt, as those of stock do",
            )
            return
        row.failure = self._what_is_not_finite(row, features, recorder)
        if row.failure:
            row.status = FAILED
            return
        position = first_difference(row.reference, row.ours)
        if position is None:
            return
        end = self.judge.end_of_text
        reference, ours = (
            ids[position] if position < len(ids) else end for ids in (row.reference, row.ours)
        )
        row.position, row.tokens = position, (reference, ours)
        language = self.outcome.languages[row.recording]
        if mode.beams > 1:
            both = (row.reference, row.ours)
            row.tie = self.judge.beams(features, mode, language, recorder.prompt, both)
        else:
            explain = self.judge.draw if "temperature" in mode.options else self.judge.next_token
            row.tie = explain(features, mode, language, row.reference[:position], row.tokens)
        row.status = EXPLAINED if row.tie.explained else UNEXPLAINED

    def _without_prompt(self, row: Row, prompt: Ids) -> bool:
        """Remove the prompt, which stock returns in some modes; False if only ours lacks it."""
        count = len(prompt)
        if row.reference[:count] != prompt:
            return True
        if row.ours[:count] != prompt:
            return False
        row.reference, row.ours = row.reference[count:], row.ours[count:]
        row.float32 = None if row.float32 is None else row.float32[count:]
        return True

    def _what_is_not_finite(
        self, row: Row, features: torch.Tensor, recorder: ScoreRecorder
    ) -> str | None:
        """Find NaN and infinity in the logits of stock's text, once per recording."""
        if not recorder.is_sound:
            return "scores of the reference are NaN or infinite in this batch"
        if row.recording in self.outcome.logit_errors:
            return None
        fed = [*row.reference, self.judge.end_of_text]
        fed = fed[: self.models.longest - len(recorder.prompt)]
        tables = {
            name: log_probabilities(model, features, recorder.prompt, fed)
            for name, model in (("stock", self.models.stock), ("ours", self.models.ours))
        }
        for name, table in tables.items():
            if not bool(table.isfinite().all()):
                return f"logits of {name} are NaN or infinite"
        error = (tables["ours"] - tables["stock"]).abs().max()
        self.outcome.logit_errors[row.recording] = float(error)
        return None


def first_difference(first: Ids, second: Ids) -> int | None:
    """Index of the first id that differs, or the length of a shorter prefix; None if equal."""
    if first == second:
        return None
    pairs = enumerate(zip(first, second, strict=False))
    shorter = min(len(first), len(second))
    return next((index for index, (one, other) in pairs if one != other), shorter)


def _label(what: str, batch: Sequence[Clip]) -> str:
    names = ", ".join(clip.name for clip in batch)
    return f"{what}: {names if len(names) < 60 else names[:57] + '...'}"


def _chunks(clips: Sequence[Clip], size: int) -> list[list[Clip]]:
    return [list(clips[start : start + size]) for start in range(0, len(clips), size)]
