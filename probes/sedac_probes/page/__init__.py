"""A workshop run on one HTML page."""
