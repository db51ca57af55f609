"""Transcription of whole archives that resumes after interruptions, on one machine or on many.

`run.py` is one run from start to end. `manifest.py` and `storage.py` find the recordings;
`stages.py` decodes and transcribes them in `run.py` or under `ray_engine.py`; `sink.py`
writes rows to `shards.py`, and files of subtitles, in the folder that `results.py` prepares;
`progress.py` says how far a run is, and what it came to. Only `model.py` calls `Transcriber`. Ray
and pyarrow are optional, and imported where they are used.
"""

from whisper_flash_attention.batch.model import Model, RunOptions
from whisper_flash_attention.batch.progress import Summary
from whisper_flash_attention.batch.run import Cluster, run_batch

__all__ = ["Cluster", "Model", "RunOptions", "Summary", "run_batch"]
