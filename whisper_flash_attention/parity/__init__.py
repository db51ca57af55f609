"""Parity: do we and stock Transformers choose the same tokens, and if not, why not?

This folder runs both on the same features, compares token ids, and explains every first difference
by the reference's own scores: a near-tie explains it, anything else is a bug. It stands on the
model class, `weights/`, `audio/` and `transcribe/`, and uses public options of `generate` only; it
must know nothing of `engine/` and `kernels/`, which it judges.
"""
