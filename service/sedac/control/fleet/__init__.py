"""Engines: who is attached, what each runs and reports."""
