"""Runs the command line as `python -m vstar_engine`."""

from vstar_engine.commands.main import main

raise SystemExit(main())
