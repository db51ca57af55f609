"""The benchmark: what is measured, how, and what the hardware would allow.

Owns settings, the systems that are compared, the measuring process, the roofline, and the files
that a run writes. `settings`, `systems`, `roofline`, `results` and `report` import no PyTorch, so
that `--help` and reports are quick; `measure` runs inside the process of one row. It must not know
how attention or the model work: it builds systems by name and calls their `generate`. Measurements
of single kernels, of the encoder alone and of texts are scripts in `benchmarks/`.
"""
