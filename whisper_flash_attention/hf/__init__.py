"""Where Transformers' `generate` meets the decode engine.

It owns two things: the translation of Transformers' options (processors, criteria, configuration)
into the engine's requests, with a reason in words for everything that cannot be translated; and
the short way for plain calls, which spends no time on Transformers' bookkeeping. It knows
Transformers and the engine; it must not know kernels, files or text. Read `loop.py` first.
"""

from whisper_flash_attention.hf.handover import HANDOVERS

__all__ = ["HANDOVERS"]
