"""Serving over HTTP: durable jobs in front of an engine that lives in another process."""
