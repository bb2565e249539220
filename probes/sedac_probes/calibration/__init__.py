"""Levels and tiers of a probe set, and what every mechanism saves and costs; on the model in plain torch."""
