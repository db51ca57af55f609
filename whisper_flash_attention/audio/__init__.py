"""Sound: reading recordings into arrays, and the few recordings that come with the package.

This folder owns decoding (any format FFmpeg knows, through PyAV), mixing down, resampling and the
index of the bundled clips. It must not know models, tokens, features, devices or the command line:
what leaves it is a NumPy array of samples and plain facts about files.
"""

from whisper_flash_attention.audio.load import SAMPLING_RATE, load_audio
from whisper_flash_attention.audio.recordings import Recording, bundled_recordings

__all__ = ["SAMPLING_RATE", "Recording", "bundled_recordings", "load_audio"]
