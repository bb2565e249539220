"""Probe sets: the store of artifacts and its service."""
