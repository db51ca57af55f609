"""Triton kernels, each with one launcher that takes preallocated tensors.

This folder owns how a decode step's few rows go through layer norm, linear layers, attention and
token selection on a GPU, and an encoder's many rows through layer norm and attention: block sizes,
number formats, overlap of kernels. It knows tensors only and must not know Whisper, Transformers,
files or graphs. Launchers allocate nothing, never wait for the device and never read a tensor's
values, so that a CUDA graph can record them. Import the modules by name: importing this package
does not import Triton.
"""
