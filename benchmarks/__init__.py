"""Timed comparisons with other implementations: a correctness gate first, then records."""
