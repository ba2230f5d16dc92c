"""Import this first: it sets how threads wait, in the tests and in what they start, before PyTorch is loaded."""

from vstar_engine.machine import threads

threads.prepare()
