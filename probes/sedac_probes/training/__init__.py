"""Probes from collections, and what they are worth."""
