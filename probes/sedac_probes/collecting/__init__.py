"""Texts through the engine into shards: streams, entropies, log-probabilities, statistics of neurons."""
