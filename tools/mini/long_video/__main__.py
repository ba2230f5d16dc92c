"""Runs `python -m tools.mini.long_video`."""

from .study import main

main()
