"""Serving over HTTP: durable jobs in front of an engine in another process."""
