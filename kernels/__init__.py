"""The engine's own operators, one a file."""
