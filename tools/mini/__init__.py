"""Trains and judges the mini model. Importing it sets how idle threads wait, which OpenMP reads when PyTorch is imported."""

from vstar_engine.machine import threads

threads.prepare()
