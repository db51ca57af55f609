"""Sounds without speech, synthesised: the same samples in every run.

Levels and lengths differ, because a system's thresholds depend on both: what is rejected when loud
may be transcribed when soft, and a sound that fills several windows has more chances than one of a
few seconds.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from whisper_flash_attention.audio import SAMPLING_RATE

Samples = npt.NDArray[np.float32]
Wave = npt.NDArray[np.float64]


def make_sounds() -> dict[str, Samples]:
    """Mono samples at 16 kHz of every sound, by a name that says what it is."""
    return {
        name: np.clip(wave, -1, 1).astype(np.float32)
        for sounds in (_silences(), _noises(), _hums(), _typing(), _music(), _breaths())
        for name, wave in sounds
    }


def _times(seconds: float) -> Wave:
    return np.arange(round(seconds * SAMPLING_RATE)) / SAMPLING_RATE


def _noise(
    seed: int, seconds: float, power: float = 0.0, band: tuple[float, float] = (0, 8e3)
) -> Wave:
    """Gaussian noise of peak 1 whose amplitude falls with frequency to this power, in a band."""
    size = round(seconds * SAMPLING_RATE)
    spectrum = np.fft.rfft(np.random.default_rng(seed).standard_normal(size))
    rates = np.fft.rfftfreq(size, 1 / SAMPLING_RATE)
    spectrum *= ((rates >= band[0]) & (rates <= band[1])) / np.maximum(rates, 20) ** power
    wave = np.fft.irfft(spectrum, size)
    return wave / np.abs(wave).max()


def _silences() -> Iterator[tuple[str, Wave]]:
    yield "silence, 40 s", 0 * _times(40)
    yield "silence, 8 s", 0 * _times(8)
    # One step of 16 bits, as a converter without input gives.
    yield "silence with dither, 40 s", np.round(_noise(1, 40) * 1.5) / 32768
    yield "silence with dither, 12 s", np.round(_noise(2, 12) * 1.5) / 32768


def _noises() -> Iterator[tuple[str, Wave]]:
    for number, (colour, power) in enumerate((("white", 0.0), ("pink", 0.5), ("brown", 1.0))):
        yield f"{colour} noise, loud, 10 s", 0.5 * _noise(10 + number, 10, power)
        yield f"{colour} noise, soft, 30 s", 0.02 * _noise(20 + number, 30, power)
    swelling = np.maximum(np.sin(2 * np.pi * _times(35) / 7), 0.02)
    yield "pink noise that swells, 35 s", 0.4 * swelling * _noise(30, 35, 0.5)
    gusts = np.interp(_times(30), range(31), np.random.default_rng(32).uniform(0.02, 1, 31))
    yield "wind, 30 s", 0.4 * gusts * _noise(32, 30, 1.0, (60, 2e3))
    yield "white noise in bursts, 20 s", 0.3 * (_times(20) % 2 < 0.4) * _noise(31, 20)


def _hums() -> Iterator[tuple[str, Wave]]:
    for rate, seconds in ((50, 15.0), (60, 35.0)):
        times = _times(seconds)
        harmonics = sum(np.sin(2 * np.pi * rate * n * times) / n**1.5 for n in (1, 2, 3, 5, 7))
        yield f"mains hum, {rate} Hz, {seconds:.0f} s", 0.1 * harmonics
    yield "fan, 25 s", 0.1 * _noise(40, 25, 0.7) + 0.05 * np.sin(2 * np.pi * 118 * _times(25))
    for rate in (440, 1000):
        yield f"tone, {rate} Hz, 10 s", 0.2 * np.sin(2 * np.pi * rate * _times(10))
    times = _times(20)
    both = np.sin(2 * np.pi * 440 * times) + np.sin(2 * np.pi * 480 * times)
    yield "ringing telephone, 20 s", 0.15 * both * (times % 6 < 2)
    yield "beeps, 12 s", 0.2 * np.sin(2 * np.pi * 950 * _times(12)) * (_times(12) % 1 < 0.2)
    yield (
        "sweep, 100 Hz to 4 kHz, 15 s",
        0.2 * np.sin(2 * np.pi * 100 * 15 / np.log(40) * (40 ** (_times(15) / 15) - 1)),
    )


def _typing() -> Iterator[tuple[str, Wave]]:
    for seed, (seconds, rate, level) in enumerate(((15.0, 5, 0.4), (30.0, 8, 0.1), (40.0, 2, 0.3))):
        yield (
            f"typing, {rate} keys a second, {seconds:.0f} s",
            level * _keys(50 + seed, seconds, rate),
        )

    tick = np.exp(-(_times(30) % 1) / 0.002) * _noise(53, 30, 0.0, (2e3, 7e3))
    yield "clock, 30 s", 0.5 * tick + 0.002 * _noise(54, 30, 0.5)


def _keys(seed: int, seconds: float, rate: float) -> Wave:
    """Clicks of 30 ms at random times, each of another key, over the noise of a room."""
    draw = np.random.default_rng(seed)
    wave = 0.005 * _noise(seed, seconds, 0.5)
    click = np.exp(-_times(0.03) / 0.005)
    for start in np.cumsum(draw.exponential(1 / rate, round(seconds * rate))):
        first = round(start * SAMPLING_RATE)
        key = click * draw.standard_normal(click.size) * draw.uniform(0.2, 0.5)
        room = wave[first : first + key.size]
        room += key[: room.size]
    return wave


def _music() -> Iterator[tuple[str, Wave]]:
    major, minor = (0, 4, 7), (0, 3, 7)
    chords = [(0, major), (9, minor), (5, major), (7, major)]
    yield "chords, 35 s", 0.2 * _notes(35, 1.0, [[root + n for n in kind] for root, kind in chords])
    melody = [[n] for n in (12, 14, 16, 17, 19, 17, 16, 14, 12, 7, 9, 11)]
    yield "melody, 15 s", 0.3 * _notes(15, 0.4, melody)
    yield (
        "arpeggio, 25 s",
        0.3 * _notes(25, 0.2, [[root + n] for root, kind in chords for n in kind]),
    )
    times = _times(20)
    drum = np.sin(2 * np.pi * 60 * (times % 0.5)) * np.exp(-20 * (times % 0.5))
    hat = _noise(60, 20, 0.0, (5e3, 8e3)) * np.exp(-60 * (times % 0.25))
    yield "drums, 20 s", 0.5 * drum + 0.2 * hat
    bend = 220 * times + 4 * np.sin(2 * np.pi * 5.5 * times)
    voice = sum(np.sin(2 * np.pi * bend * n) / n for n in range(1, 9))
    yield "a string with vibrato, 20 s", 0.1 * voice * np.sin(np.pi * times / 20)


def _notes(seconds: float, length: float, notes: list[list[int]]) -> Wave:
    """Notes in semitones above 220 Hz, several at a time, each of this length, over and over."""
    times = _times(seconds)
    step = (times / length).astype(int) % len(notes)
    wave = np.zeros_like(times)
    for number, together in enumerate(notes):
        for note in together:
            rate = 220 * 2 ** (note / 12)
            wave += (step == number) * sum(
                np.sin(2 * np.pi * rate * n * times) / n**2 for n in (1, 2, 3)
            )
    return wave * np.exp(-2 * (times % length) / length) / max(map(len, notes))


def _breaths() -> Iterator[tuple[str, Wave]]:
    for number, (seconds, period, level) in enumerate(
        ((12.0, 4.0, 0.1), (30.0, 3.0, 0.05), (40.0, 5.0, 0.02))
    ):
        times = _times(seconds) % period / period
        # In, then out, longer and lower.
        drawn = np.sin(np.pi * np.clip(times / 0.35, 0, 1)) ** 2
        blown = np.sin(np.pi * np.clip((times - 0.4) / 0.5, 0, 1)) ** 2
        wave = drawn * _noise(70 + number, seconds, 0.3, (500, 6e3))
        wave += blown * _noise(80 + number, seconds, 0.5, (200, 4e3))
        yield f"breath, every {period:.0f} s, {seconds:.0f} s", level * wave
