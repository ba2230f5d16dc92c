"""Benchmarks: one timer, one file a subject."""
