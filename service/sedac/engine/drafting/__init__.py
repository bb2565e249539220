"""Lossless self-speculation: a part of the served model drafts, the whole of it verifies.

The way of a draft: `drafter.py` is what vLLM calls after each step. It asks `controller.py` how far to draft, and `passes.py` drafts: it
runs `model.py` (the target's own layers on the target's own KV cache, then a head of `heads.py`) with the metadata of `attention.py`, and
draws tokens with `draws.py`. vLLM's own rejection sampler verifies.
"""
