"""Audio: reading recordings, log-mel features, voice activity, and the bundled clips.

This folder owns decoding (any format FFmpeg knows, through PyAV), mixing down, resampling, log-mel
features (`log_mel`, which imports PyTorch), voice activity detection (`frames`, `vad`), and the
index of the bundled clips. It must not know models, tokens or the command line.
"""

from whisper_flash_attention.audio.audio_source import audio_tracks, load_audio, stream_audio
from whisper_flash_attention.audio.bundled_clips import BundledClip, bundled_recordings
from whisper_flash_attention.audio.container import AudioTrack
from whisper_flash_attention.audio.samples import SAMPLING_RATE

__all__ = [
    "SAMPLING_RATE",
    "AudioTrack",
    "BundledClip",
    "audio_tracks",
    "bundled_recordings",
    "load_audio",
    "stream_audio",
]
