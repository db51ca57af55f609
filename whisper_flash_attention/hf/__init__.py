"""The connection of Transformers' `generate` to the decode engine.

`decode_hooks` replaces the encoder step and the decode loops of `generate`, `fast_path` bypasses
Transformers' preparation for calls that were prepared before, and `eligibility` alone decides
whether the engine may run a call. Other calls fall back to Transformers' own decode loop; the
reason (`fallback`) is logged once.

This package knows Transformers and the engine; it must not know kernels, files or text.
"""
