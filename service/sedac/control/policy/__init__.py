"""Policies: the store of revisions, what changes them, who watches them."""
