"""Runs the command line as `python -m vstar_engine`."""

from .cli import main

raise SystemExit(main())
