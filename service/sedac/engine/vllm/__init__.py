"""Everything that touches vLLM: its registration, its classes, its sampler, what is refused."""
