"""A denoiser that computes a long clip in windows: one global prediction a step, so that any solver takes it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vstar_engine.config.windows import EVERY, WindowPlan
from vstar_engine.kernels.guided_step import COEFFICIENTS
from vstar_engine.networks.blocks import attention_windows
from vstar_engine.networks.denoiser import Denoiser, update
from vstar_engine.networks.guide_keys import GuideKeys, guided_by
from vstar_engine.networks.precomputed import ContextKV, TimestepTable
from vstar_engine.networks.step import Conditioning, NetworkCall, SamplingStep, StepInputs
from vstar_engine.prompting.interpolation import FrameTexts

from .window_merge import WindowMerge, cuts, starts


class WrappedDenoiser(Denoiser):
    """A denoiser that runs another one; what it does not change is the other's."""

    def __init__(self, inner: Denoiser, plan: WindowPlan):
        self.inner, self.plan = inner, plan
        self.records_steps = inner.records_steps

    @property
    def module(self) -> nn.Module | None:
        return self.inner.module

    def prepare_context(self, *contexts: Tensor) -> ContextKV | Tensor:
        return self.inner.prepare_context(*contexts)

    def timestep_table(self, timesteps: Tensor, fps: Tensor) -> TimestepTable:
        return self.inner.timestep_table(timesteps, fps)

    def graph_bytes(self) -> int:
        return self.inner.graph_bytes()

    def forget_graphs(self) -> bool:
        return self.inner.forget_graphs()


class FreeNoiseDenoiser(WrappedDenoiser):
    """Runs all frames in one pass whose temporal attention has windows; its steps are not recorded."""

    def run_step(self, step: SamplingStep) -> tuple[Tensor, ...]:
        with attention_windows(eager_network(self), self.plan.starts, self.plan.window):
            return Denoiser.run_step(self.inner, step)


def in_windows(denoiser: Denoiser, plan: WindowPlan, at_once: int = 1) -> Denoiser:
    """Returns a denoiser that runs a clip as its plan says, `at_once` windows in a call."""
    return FreeNoiseDenoiser(denoiser, plan) if plan.one_pass else WindowedDenoiser(denoiser, plan, at_once)


class WindowedDenoiser(WrappedDenoiser):
    """Runs the windows of each video through another denoiser, `at_once` in a call, and merges them.

    `tar` in a step has rows of a window's frames. Contexts are tensors, or `FrameTexts` of which a window's rows are made when
    it runs, so that neither text nor its K and V are ever held for the whole clip.
    """

    def __init__(self, inner: Denoiser, plan: WindowPlan, at_once: int = 1):
        super().__init__(inner, plan)
        self.at_once = at_once

    def run_step(self, step: SamplingStep) -> tuple[Tensor, ...]:
        videos = len(step.inputs.latents)
        guided = torch.cat([self._merged(step, video) for video in range(videos)])
        alone = torch.arange(videos, device=guided.device)
        return update(step.inputs._replace(plain=alone), guided)

    def _merged(self, step: SamplingStep, video: int) -> Tensor:
        """Returns the guided noise prediction of a video, (1, C, T, h, w) in the latents' dtype."""
        seed, plan = step.seeds[video], self.plan
        begins = starts(plan, seed, step.index)
        dropped = cuts(plan, begins, seed, step.index)
        merge = WindowMerge(plan.frames, plan.blend)
        keys, wide = self._keys(step, video), 1 if plan.guide else self.at_once
        for first in range(0, len(begins), wide):
            places = begins[first : first + wide]
            parts = self._guided(step, video, [range(start, start + plan.window) for start in places], keys).split(1)
            if keys is not None:  # the first window is the first to run, and records where the keys are its own
                keys.recording = False
            for start, part, kept in zip(places, parts, dropped[first:], strict=False):
                merge.add(start, part, kept)
            if step.on_part is not None:
                step.on_part(video * len(begins) + first + len(places), len(step.seeds) * len(begins))
        return merge.result()

    def _keys(self, step: SamplingStep, video: int) -> GuideKeys | None:
        """Returns guide keys that are still to be recorded by the first window, or that a call of their frames recorded."""
        how, frames = self.plan.guides
        if not frames:
            return None
        keys = GuideKeys(range(len(frames)))
        if how == EVERY:
            self._guided(step, video, [range(0, self.plan.frames, frames[1] if len(frames) > 1 else self.plan.frames)], keys)
            keys.recording = False
        return keys

    def _guided(self, step: SamplingStep, video: int, windows: Sequence[range], keys: GuideKeys | None = None) -> Tensor:
        """Returns the guided predictions of windows of a video, ranges of frames of one length: (windows, C, length, h, w).

        TAR is for windows of neighbouring frames; without it where frames are left out.
        """
        inputs, count, length = step.inputs, len(windows), len(windows[0])
        calls, texts = [], 0
        for call in step.calls:
            rows = len(call.rows)
            own = [text for i, text in enumerate(call.conditioning.contexts) if call.rows[i % rows] == video]
            if own:
                texts += len(own)
                contexts = tuple(rows_of(text, window) for text in own for window in windows)
                calls.append(NetworkCall(tuple(range(count)), Conditioning(contexts)))
        latents = torch.cat([inputs.latents[video : video + 1, :, w.start : w.stop : w.step] for w in windows])
        # the update then returns the guided prediction itself
        coefficients = inputs.coefficients.new_zeros(count, len(COEFFICIENTS))
        coefficients[:, COEFFICIENTS.index("guidance")] = inputs.coefficients[video, COEFFICIENTS.index("guidance")]
        coefficients[:, COEFFICIENTS.index("direction")] = 1
        timestep, fps, tar = (_row(value, video).expand(count, *value.shape[1:]).contiguous() for value in inputs[1:4])
        if windows[0].step > 1:
            tar = tar.new_zeros(*tar.shape[:2], length)
        plain = torch.arange(count, device=latents.device) + (count if texts > 1 else 0)
        window = StepInputs(latents, timestep, fps, tar, coefficients, torch.zeros_like(latents), plain)
        taken = SamplingStep(step.dtype, step.timesteps, tuple(calls), window)
        if keys is None:
            return self.inner.run_step(taken)[0]
        with guided_by(eager_network(self), keys):
            return Denoiser.run_step(self.inner, taken)[0]


def eager_network(denoiser: WrappedDenoiser) -> nn.Module:
    """Returns the network whose attentions are changed; ValueError where an engine was built."""
    if denoiser.module is None:
        raise ValueError("guide keys and blend freenoise need the network in eager PyTorch, and this engine was built")
    return denoiser.module


def _row(value: Tensor, video: int) -> Tensor:
    """Returns one video's row of a tensor that may have one row for all."""
    return value if len(value) == 1 else value[video : video + 1]


def rows_of(context: Tensor | FrameTexts, window: range) -> Tensor:
    """Returns the context of a window, (1, 1 or length, L, C)."""
    if isinstance(context, FrameTexts):
        return context.rows(window.start, window.stop)[:, :: window.step]
    return context if context.shape[1] == 1 else context[:, window.start : window.stop : window.step]
