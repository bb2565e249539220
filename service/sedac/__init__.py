"""SEDAC: adaptive-compute serving of language models through vLLM."""

__version__ = "0.2.0"
