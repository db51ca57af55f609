"""The decode engine: from log-mel features to token ids, without Transformers' own loop.

It owns the decoder's buffers, its step (PyTorch on every device, Triton kernels and CUDA graphs on
NVIDIA GPUs), logits processors, beam search and the memory plan. It knows weights and tensors, but
no files, no Transformers options and no text. Read `engine.py` first.
"""
