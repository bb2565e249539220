"""SEDAC: adaptive-compute serving of language models through vLLM."""

__version__ = "0.1.0"
