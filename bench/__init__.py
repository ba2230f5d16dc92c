"""Measurements: one timer, one row format, and a command per thing measured."""
