"""Trains and judges the mini model. Its programs compute, so this sets how their threads wait before they import PyTorch."""

from vstar_engine.machine import threads

threads.prepare()
