"""Parity: comparison of our tokens with those of stock Transformers.

Both models run on the same features; every first difference of token ids is judged by the
reference's own scores: a near-tie explains it, anything else is a bug. This package uses public
options of `generate` only, and knows nothing of `engine/` and `kernels/`, which it judges.
"""
