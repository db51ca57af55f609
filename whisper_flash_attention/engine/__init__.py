"""The decode engine: from log-mel features to token ids, without Transformers' own loop.

It owns the decoder's buffers, its step (a PyTorch one for every device, Triton kernels and CUDA
graphs on NVIDIA's), the rules of token choice, beams, and what all of it costs in memory. It knows
weights and tensors; it must not know files, options of Transformers, or text. Read `loop.py` first.
"""
