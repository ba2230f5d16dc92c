"""A denoiser whose calls are looked at."""

from vstar_engine.networks.denoiser import Denoiser


class Watched(Denoiser):
    """Hands every call on to another denoiser, after `seen` saw its arguments."""

    def __init__(self, denoiser, seen):
        self.denoiser, self.seen = denoiser, seen

    def __call__(self, *given):
        self.seen(*given)
        return self.denoiser(*given)
