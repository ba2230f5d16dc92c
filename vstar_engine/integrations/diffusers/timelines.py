"""The timeline: states of a prompt, each at its place in the clip."""

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vstar_engine.prompting.synopsis import Synopsis

from .calls import Call, Calls, SchedulerOf
from .denoisers import MOTION, UNET3D, WAN, Denoiser, check_layer, denoisers, text_layers
from .mounting import Mounts
from .places import State, frame_weights, latent_weights, relay_bias, split
from .report import LayerReport, Report
from .text_attention import FrameTexts, MixedTexts, Texts

# the frame rate that seconds are counted by, where none is given: the models' own
FPS = {UNET3D: 8.0, MOTION: 8.0, WAN: 16.0}
RULES = ("mix", "relay")


class _Part:
    """A timeline on one denoiser."""

    def __init__(self, timeline: "Timeline", denoiser: Denoiser):
        self.timeline, self.denoiser, self.texts = timeline, denoiser, Texts()
        # a motion model takes a text for each frame as it is
        self._layers = [] if denoiser.family == MOTION else list(text_layers(denoiser))
        if denoiser.family != MOTION and not self._layers:
            raise ValueError(f"{denoiser.name} has no attention to text")
        for layer in self._layers:
            check_layer(layer, denoiser)

    def on(self) -> None:
        make = MixedTexts if self.denoiser.family == WAN else FrameTexts
        self._mounts = Mounts(self._layers, lambda layer: make(layer.module.processor, self.texts))
        self._calls = Calls(self.denoiser, self.timeline.scheduler, self._before)

    def off(self) -> None:
        self._calls.off()
        self._mounts.off()

    def _before(self, call: Call, text: Tensor) -> Tensor | None:
        self._mounts.check()
        timeline = self.timeline
        states, length = len(timeline.texts_of_states), timeline.length
        if length is None or text.shape[1] != states * length:
            raise ValueError(
                f"a timeline of {states} states is on, and the denoiser was called with one text of {text.shape[1]} tokens:"
                " call the pipeline with **timeline.texts(...), or take the timeline off"
            )
        weights = timeline.weights(call.frames).to(text.device)
        if self.denoiser.family == WAN:
            self.texts.tokens, self.texts.length = call.tokens, length
            self.texts.weights, self.texts.bias = weights, None
            if timeline.rule == "relay":
                self.texts.bias = timeline.bias(call.frames).to(text.device)
            return None
        # a motion model's rows are those of frames already, all of a video's alike
        rows = text[:: call.frames] if self.denoiser.family == MOTION else text
        embedded = rows.unflatten(1, (states, length))
        spread = (weights.to(text.dtype)[None, :, :, None, None] * embedded[:, None]).sum(2).flatten(0, 1)
        if self.denoiser.family == MOTION:
            return spread
        self.texts.rows = spread
        # repeated over the frames by the model, and not read
        return text[:, :length]

    def report(self) -> list[LayerReport]:
        name, timeline = self.denoiser.name, self.timeline
        if self.denoiser.family == MOTION:
            return [LayerReport(name, "encoder_hidden_states", "a text for each frame", "the model's own")]
        rule = "a text for each frame" if self.denoiser.family == UNET3D else f"states by frame, {timeline.rule}"
        backend = "the processor that was there" if self.denoiser.family == UNET3D else "PyTorch's attention, a frame a row"
        return [LayerReport(name, layer.path, rule, backend) for layer in self._layers]


class Timeline:
    """A timeline that is on; `off()` or the end of a `with` block puts the very processors back that were there."""

    def __init__(self, pipe: Any, states: Sequence[State] | Synopsis, transition: Any, fps: float | None, mode: str, rule: str):
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
        found = denoisers(pipe)
        if rule == "relay" and any(one.family != WAN for one in found):
            raise ValueError(
                "relay biases a transformer's attention to all states at once; a UNet's frames each have their text"
            )
        self.pipe, self.rule, self.mode, self.transition = pipe, rule, mode, transition
        self.scheduler = SchedulerOf(pipe)
        self.texts_of_states, self.places = split(states)
        self.fps = FPS[found[0].family] if fps is None else fps
        self.length: int | None = None
        # what a latent frame holds: the first one frame, the others so many
        self.stride = pipe.vae_scale_factor_temporal if found[0].family == WAN else 1
        parts = [_Part(self, one) for one in found]
        for part in parts:
            part.on()
        self._parts = parts

    def weights(self, latent_frames: int) -> Tensor:
        """Returns the weight of each state in each latent frame, (latent_frames, states) float32."""
        frames = (latent_frames - 1) * self.stride + 1
        weights = frame_weights(self.places, len(self.texts_of_states), frames, self.fps, self.transition, self.mode)
        return latent_weights(weights, latent_frames)

    def bias(self, latent_frames: int) -> Tensor:
        """Returns Prompt Relay's biases, (latent_frames, states) float32: a state's segment begins where it has most weight."""
        first = self.weights(latent_frames).argmax(1)
        starts = [int((first == i).nonzero()[0]) if (first == i).any() else -1 for i in range(len(self.texts_of_states))]
        if -1 in starts:
            raise ValueError(f"{latent_frames} latent frames are too few: state {starts.index(-1) + 1} has none of its own")
        return relay_bias(starts, latent_frames)

    def texts(self, negative_prompt: str = "", **options: Any) -> dict[str, Tensor]:
        """Encodes the states: pass the result to the pipeline, `pipe(**timeline.texts("blurry"), num_frames=...)`.

        `options` go to the pipeline's `encode_prompt`. Returns `prompt_embeds` and `negative_prompt_embeds`, each
        (1, states * tokens, channels): the states' texts one after another.
        """
        encode, names = self.pipe.encode_prompt, inspect.signature(self.pipe.encode_prompt).parameters
        usual: dict[str, Any] = {"device": self.pipe._execution_device, "do_classifier_free_guidance": True}
        if "num_images_per_prompt" in names:
            usual["num_images_per_prompt"] = 1
        if "max_sequence_length" in names:
            # what Wan's pipelines encode a prompt with
            usual["max_sequence_length"] = 512
        states = len(self.texts_of_states)
        negative = [negative_prompt] * states
        cond, uncond = encode(prompt=self.texts_of_states, negative_prompt=negative, **{**usual, **options})[:2]
        self.length = cond.shape[1]
        return {"prompt_embeds": cond.flatten(0, 1)[None], "negative_prompt_embeds": uncond.flatten(0, 1)[None]}

    def report(self) -> Report:
        """Returns which layers the timeline is on, and how seconds are counted."""
        lines = tuple(line for part in self._parts for line in part.report())
        return Report(
            lines, (f"seconds are counted at {self.fps:g} frames a second",) if self._parts else ("the timeline is off",)
        )

    def off(self) -> None:
        """Takes the timeline off; a second call does nothing."""
        for part in self._parts:
            part.off()
        self._parts = []

    def __enter__(self) -> "Timeline":
        return self

    def __exit__(self, *raised: object) -> None:
        self.off()


def timeline(
    pipe: Any,
    states: Sequence[State] | Synopsis,
    *,
    transition: str | float | None = None,
    fps: float | None = None,
    mode: str = "linear",
    rule: str = "mix",
) -> Timeline:
    """Puts a timeline on a diffusers pipeline: each state is a text, or (place, text); or a whole synopsis.

    A place is a frame (12), a share of the clip (0.5, "50%") or seconds ("1.8s") at `fps`, by default the model's own rate.
    Without places the states are spread evenly. Frames between two states mix them by `mode` (linear, ease, hold), or over
    `transition` frames or seconds before the next one's place. UNets' frames get interpolated text (VSTAR's synopsis
    prompting, arXiv 2403.13501); Wan's frames mix the states' keys and values, or with rule "relay" follow Prompt Relay.
    Call the pipeline with `**timeline.texts(negative_prompt)` in place of a prompt. Raises ValueError as `dial` does.
    """
    return Timeline(pipe, states, transition, fps, mode, rule)
