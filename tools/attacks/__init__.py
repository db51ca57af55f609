"""Generators of hostile input for `tools/attack.py`; they know formats, and no tests."""
