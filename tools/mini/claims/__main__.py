"""Runs `python -m tools.mini.claims`."""

from .study import main

main()
