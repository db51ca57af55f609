"""Sound: reading recordings, Whisper's input from them, and the few that come with the package.

This folder owns decoding (any format FFmpeg knows, through PyAV), mixing down, resampling, log-mel
features (`log_mel`, `mel` and `mel_windows`, which import PyTorch), where somebody speaks, and the
index of the bundled clips. It must not know models, tokens or the command line.
"""

from whisper_flash_attention.audio.load import SAMPLING_RATE, load_audio, stream_audio
from whisper_flash_attention.audio.recordings import Recording, bundled_recordings

__all__ = ["SAMPLING_RATE", "Recording", "bundled_recordings", "load_audio", "stream_audio"]
