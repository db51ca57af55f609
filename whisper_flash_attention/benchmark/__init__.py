"""The benchmark of whole `generate` calls: settings, systems, measurement, roofline, results.

`settings`, `systems`, `roofline`, `results` and `report` import no PyTorch, so that `--help` and
reports are quick; `measure` runs in the process of one row. It builds systems by name and calls
their `generate`, and knows nothing of their attention. `mlperf` runs MLPerf's load generator over
the samples of `spoken`. Single kernels, the encoder alone and texts are measured by the scripts in
`benchmarks/`.
"""
