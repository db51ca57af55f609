"""Transcription of whole archives, which can be stopped and goes on, on one machine or on many.

`manifest.py` and `places.py` find the recordings; `stages.py` decodes and transcribes them, under
the engine `local.py` or `on_ray.py`, and `faults.py` tells a recording's error from a bug;
`sink.py` brings rows to `shards.py` and to files called as `subtitle_names.py` says, in the folder
that `results.py` keeps in order; `run.py` is the whole story and `command.py` its command line. It
stands on `transcribe/` and `audio/` (`model.py` is the seam) and must not know how anything is
decoded. Ray and pyarrow are imported where they are used, and only there.
"""

from whisper_flash_attention.batch.model import Asked, Model
from whisper_flash_attention.batch.run import Cluster, run_batch
from whisper_flash_attention.batch.summary import Summary

__all__ = ["Asked", "Cluster", "Model", "Summary", "run_batch"]
