"""The settings of a video: one table that the command line, the HTTP API, stored jobs, remix and `inspect` are made from.

A new setting is a field of `Clip`, `Sampling` or `Tar`, with its type, default and check, and a row of VIDEO_FIELDS.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from types import NoneType
from typing import Any, get_args, get_origin

from .models import parse_size
from .request import Clip, Request
from .sampling import FEW_STEP, SAMPLERS, SPACINGS, TAR_PRESETS, TRAINING_STEPS, Sampling, Tar, parse_sigma, until_step
from .streamed import frame_count
from .timeline import SPREAD_MODES, parse_position
from .windows import BLENDS, LONGEST, MAX_FRAMES, NOISES

# the dataclass that the front of a path names
HOLDERS: dict[str, type] = {"": Request, "sampling": Sampling, "tar": Tar}
DEFAULT_PRESET = "64D1_32D8"
# where the HTTP API takes a setting: at the top of a body, in its `tar`, in each state of its `synopsis`
BODY, TAR, STATE = "", "tar", "synopsis"


def unchanged(value: Any) -> Any:
    """Returns a value as it is."""
    return value


@dataclass(frozen=True)
class VideoField:
    """A setting of a video and its names.

    `path` is where a `Request` holds it, and its key in a file's provenance. `flag` is its option, by default the last word of
    `path`; `parse` reads the option's text and `spell` writes it again; `read` makes the option's own value, where its type
    does not. `kind` is a value's type, by default the declared one.
    `http` is its name in the HTTP API, behind `tar.` or `synopsis.` where it stands there; None keeps it out of the API, and
    `settable` False shows it there without taking it. `bounds` (ge, gt, le, lt) and `choices` limit what the API takes, and
    `to_http` converts a value for it.
    """

    path: str
    help: str
    http: str | None = None
    flag: str = ""
    metavar: str | None = None
    parse: Callable[[str], Any] | None = None
    read: Callable[[str], Any] | None = None
    spell: Callable[[Any], str] = str
    kind: Any = None
    bounds: Mapping[str, float] = field(default_factory=dict)
    choices: tuple[str, ...] = ()
    to_http: Callable[[Any], Any] = unchanged
    http_help: str = ""
    settable: bool = True

    @property
    def name(self) -> str:
        """Returns the last word of the path, which is also the setting's name in a stored job."""
        return self.path.rpartition(".")[2]

    @property
    def option(self) -> str:
        """Returns the option's name, without the dashes in front."""
        return self.flag or self.name.replace("_", "-")

    @property
    def attribute(self) -> str:
        """Returns the name of the option's value among those that were parsed."""
        return self.option.replace("-", "_")

    @property
    def place(self) -> str | None:
        """Returns where the HTTP API has it: BODY, TAR, STATE or None."""
        return None if self.http is None else self.http.rpartition(".")[0]

    @property
    def http_name(self) -> str:
        """Returns its name at that place."""
        return (self.http or "").rpartition(".")[2]

    @property
    def declared(self) -> Field[Any]:
        """Returns the field of the dataclass that holds it."""
        return {one.name: one for one in fields(HOLDERS[self.path.rpartition(".")[0]])}[self.name]

    @property
    def many(self) -> bool:
        """Returns whether it holds any number of values, such as one for each state."""
        return get_origin(self.declared.type) is Mapping or get_args(self.declared.type)[1:] == (...,)

    @property
    def value_type(self) -> Any:
        """Returns the type of a value: of each one where there are many, and without None."""
        if self.kind is not None:
            return self.kind
        if self.many:
            return get_args(self.declared.type)[0]
        (kind,) = {*(get_args(self.declared.type) or (self.declared.type,))} - {NoneType}
        return kind

    @property
    def optional(self) -> bool:
        """Returns whether its value may be None."""
        return NoneType in get_args(self.declared.type)

    def default(self, fast: tuple[str, ...] = (), own: Iterable[tuple[str, Any]] = ()) -> Any:
        """Returns the default with lossy options `fast` and a model's `own`; None when other settings decide it."""
        if self.path == "tar":
            return DEFAULT_PRESET
        if self.path == "tar.until_step":
            return Sampling.usual(fast, own).until
        if self.path.startswith("sampling."):
            return getattr(Sampling.usual(fast, own), self.name)
        return None if self.declared.default is MISSING else self.declared.default

    @property
    def follows_fast(self) -> bool:
        """Returns whether the default depends on `fast`."""
        return self.path != "sampling.fast" and self.default() != self.default((FEW_STEP,))


VIDEO_FIELDS = [
    VideoField(
        "states", "descriptions of the states, in order; repeatable", "synopsis.text", metavar="TEXT", http_help="what is seen"
    ),
    VideoField("negative", "negative prompt: what the video should not show", "negative_prompt"),
    VideoField(
        "negatives",
        "negative prompt of each state",
        "synopsis.negative",
        metavar="TEXT",
        http_help="negative prompt of the state",
    ),
    VideoField("mode", f"interpolation of states over the frames: {', '.join(SPREAD_MODES)}", "spread", choices=SPREAD_MODES),
    VideoField(
        "at",
        "position of each state: a frame such as 12, a share of the clip such as 0.5 or 50%, or a time such as 12s",
        "synopsis.at",
        metavar="PLACE",
        parse=parse_position,
        http_help="position: a frame such as 12, a share of the clip such as 0.5 or 50%, or a time such as 12s",
    ),
    VideoField(
        "durations",
        "relative length of each state",
        "synopsis.duration",
        metavar="LENGTH",
        bounds={"gt": 0, "le": 1e6},
        http_help="length, relative to the other states'",
    ),
    VideoField(
        "frames",
        "number of frames; inf with a streaming model",
        "num_frames",
        read=frame_count,
        bounds={"ge": 1, "le": LONGEST},
        http_help="number of frames",
    ),
    VideoField(
        "window",
        f"frames of a window: makes longer clips, also above {MAX_FRAMES} frames, in windows",
        "window",
        bounds={"ge": 1, "le": MAX_FRAMES},
    ),
    VideoField("overlap", "frames that a window shares with the one before", "overlap", bounds={"ge": 0, "lt": MAX_FRAMES}),
    VideoField("blend", f"how windows are merged: {', '.join(BLENDS)}", "blend", choices=BLENDS),
    VideoField("phase", "move the inner windows from step to step"),
    VideoField("noise", f"initial noise of the frames: {', '.join(NOISES)}", "noise", choices=NOISES),
    VideoField("guide", "frames that every window attends to: first:N of the first window, or every:N, each Nth of the clip"),
    VideoField("noise_share", "variance of shared noise that all frames have in common"),
    VideoField(
        "size",
        "size in pixels (default: the model's own)",
        "size",
        metavar="HEIGHTxWIDTH",
        parse=parse_size,
        spell=lambda size: f"{size[0]}x{size[1]}",
        to_http=lambda size: f"{size[1]}x{size[0]}",
        http_help="WIDTHxHEIGHT in pixels",
    ),
    VideoField("seed", "random seed", "seed", bounds={"ge": 0, "lt": 2**32}, http_help="random seed; drawn by default"),
    VideoField("sampling.steps", "number of denoising steps", "num_inference_steps", bounds={"ge": 1, "le": TRAINING_STEPS}),
    VideoField("sampling.guidance", "classifier-free guidance scale", "guidance_scale", bounds={"ge": 0, "le": 100}),
    VideoField("sampling.eta", "DDIM eta: 0 adds no noise in a step, 1 most", "eta", bounds={"ge": 0, "le": 1}),
    VideoField("sampling.sampler", f"sampler: {', '.join(SAMPLERS)}", "sampler", choices=SAMPLERS),
    VideoField("sampling.spacing", f"spacing of the timesteps: {', '.join(SPACINGS)}", "spacing", choices=SPACINGS),
    VideoField("sampling.fps_condition", "frame rate that conditions the model"),
    VideoField("sampling.batch_guidance", "run both guidance branches in one batch (faster) or in two passes (less memory)"),
    VideoField("sampling.fast", "lossy options that save time", "fast", settable=False),
    VideoField("tar", f"TAR preset: {', '.join(TAR_PRESETS)}", "tar.preset", kind=str, http_help="such as 64D1_32D8, or none"),
    VideoField(
        "tar.sigma",
        "TAR sigma in frames, of a UNet level; repeatable",
        "tar.sigma",
        metavar="LEVEL=VALUE",
        parse=parse_sigma,
        spell=lambda level: f"{level[0]}={level[1]}",
        http_help="sigma in frames by UNet level, on top of the preset's; a number sets level 0",
    ),
    VideoField("tar.strength", "TAR strength", "tar.strength", bounds={"ge": -100, "le": 100}),
    VideoField(
        "tar.until_step",
        "last step with TAR, counted from 0, or a share of the steps such as 56%",
        "tar.until",
        flag="until",
        metavar="STEP",
        parse=until_step,
    ),
    VideoField("fps", "frame rate of the file", "fps", bounds={"ge": 1, "le": 60}),
]


def fields_at(place: str | None) -> list[VideoField]:
    """Returns the settings that the HTTP API has at BODY, TAR or STATE, or None: those it does not have."""
    return [row for row in VIDEO_FIELDS if row.place == place]


def clip_from(values: Mapping[str, Any]) -> Clip:
    """Builds a clip of values by their paths, the finished `Tar` under "tar"; what is left out has its default."""
    return Clip(**_keywords(values))


def request_from(values: Mapping[str, Any]) -> Request:
    """Builds a request as `clip_from` builds a clip, of its states too."""
    return Request(**_keywords(values))


def _keywords(values: Mapping[str, Any]) -> dict[str, Any]:
    sampling = {path.removeprefix("sampling."): value for path, value in values.items() if path.startswith("sampling.")}
    return {path: value for path, value in values.items() if "." not in path} | {"sampling": Sampling(**sampling)}
