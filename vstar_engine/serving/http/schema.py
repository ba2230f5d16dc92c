"""The bodies of the API, as OpenAI's Videos clients speak them and with what this engine adds."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from vstar_engine.config.request import MAX_FRAMES

LONGEST_PROMPT, LONGEST_STATE, MOST_STATES = 2000, 1000, 32
NO_NUL = r"^[^\x00]*$"
SIZE = r"^[1-9][0-9]{1,3}x[1-9][0-9]{1,3}$"
BUNDLE = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"


def _seen(words: str) -> str:
    if not words.strip():
        raise ValueError("these words are blank; say what shall be seen")
    return words


Prompt = Annotated[str, Field(min_length=1, max_length=LONGEST_PROMPT, pattern=NO_NUL), AfterValidator(_seen)]
Unwanted = Annotated[str, Field(max_length=LONGEST_PROMPT, pattern=NO_NUL)]
Words = Annotated[str, Field(min_length=1, max_length=LONGEST_STATE, pattern=NO_NUL), AfterValidator(_seen)]
Sigma = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Level = Annotated[str, Field(pattern=r"^[0-9]$")]
Place = Annotated[int, Field(ge=0, lt=MAX_FRAMES)] | Annotated[float, Field(ge=0, le=1)] | Annotated[str, Field(max_length=20)]
Priority = Annotated[int, Field(ge=-10, le=10)]
Label = Annotated[str, Field(min_length=1, max_length=64, pattern=NO_NUL)]
Note = Annotated[str, Field(max_length=512, pattern=NO_NUL)]


class Strict(BaseModel):
    """A body without fields that are not declared."""

    model_config = ConfigDict(extra="forbid")


class State(Strict):
    """One state of a synopsis: what is seen, and where in the clip."""

    text: Words
    at: Place | None = Field(default=None, description="a frame such as 12, or a share of the clip such as 0.5 or 50%")
    duration: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None = Field(
        default=None, description="its length relative to the other states'"
    )
    negative: Unwanted | None = Field(default=None, description="what it should not show")


class TarSettings(Strict):
    """Temporal attention regularisation: the motion dial. Smaller sigma means more motion."""

    preset: Annotated[str, Field(max_length=40)] | None = Field(default=None, description="such as 64D1_32D8, or none")
    sigma: Sigma | dict[Level, Sigma] | None = Field(
        default=None, description="in frames, by level of the UNet, on top of the preset's; a number is level 0's"
    )
    strength: Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)] | None = None
    until: Annotated[int, Field(ge=-1, le=1000)] | Annotated[str, Field(pattern=r"^[0-9]{1,4}%?$")] | None = Field(
        default=None, description="last step with it, counted from 0, or a share of the steps such as 56%"
    )


Synopsis = Annotated[list[Words | State], Field(min_length=1, max_length=MOST_STATES)]


class Wishes(Strict):
    """What may be said of a video beside its prompt."""

    model: Annotated[str, Field(max_length=100)] | None = None
    seconds: Annotated[int, Field(ge=1, le=600)] | Annotated[str, Field(pattern=r"^[1-9][0-9]{0,2}$")] | None = Field(
        default=None, description="length; num_frames comes before it"
    )
    num_frames: Annotated[int, Field(ge=1, le=MAX_FRAMES)] | None = None
    size: Annotated[str, Field(pattern=SIZE)] | None = Field(default=None, description="WIDTHxHEIGHT in pixels")
    fps: Annotated[float, Field(ge=1, le=60, allow_inf_nan=False)] | None = Field(default=None, description="of the file")
    synopsis: Synopsis | None = Field(default=None, description="the states that the video passes through, in order")
    subprompts: Synopsis | None = Field(default=None, description="another name of synopsis")
    spread: Literal["linear", "ease", "hold"] | None = Field(default=None, description="how states spread over the frames")
    tar: Annotated[str, Field(max_length=40)] | TarSettings | None = None
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    eta: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    negative_prompt: Unwanted | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = Field(default=None, description="drawn where it is not given")
    embeddings: Annotated[str, Field(pattern=BUNDLE)] | None = Field(default=None, description="id of a precomputed bundle")
    enhance_prompt: bool | None = Field(
        default=None, description="describe the prompt's states; true where no synopsis is given"
    )
    priority: Priority | None = Field(default=None, description="higher runs earlier")
    metadata: Annotated[dict[Label, Note], Field(max_length=16)] | None = None
    # sent by habit, and ignored
    user: Annotated[str, Field(max_length=512)] | None = None
    quality: Annotated[str, Field(max_length=64)] | None = None
    n: Annotated[int, Field(ge=1, le=1)] | Literal["1"] | None = None

    @model_validator(mode="after")
    def _one_synopsis(self) -> "Wishes":
        given = [name for name in ("synopsis", "subprompts", "embeddings") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of {' and '.join(given)}")
        if given and self.enhance_prompt:
            raise ValueError(f"enhance_prompt describes a prompt's states, and {given[0]} brings them")
        if self.embeddings is not None and self.negative_prompt is not None:
            raise ValueError("embeddings bring their negative prompt with them; leave out negative_prompt")
        return self

    @property
    def states(self) -> list[Any] | None:
        return self.synopsis or self.subprompts


class CreateVideo(Wishes):
    """A video to make."""

    prompt: Prompt | None = Field(default=None, description="may be left out where a synopsis or embeddings are given")

    @model_validator(mode="after")
    def _something(self) -> "CreateVideo":
        if self.prompt is None and self.states is None and self.embeddings is None:
            raise ValueError("give a prompt")
        return self


class RemixVideo(Wishes):
    """A video made again with another prompt; everything else stays unless it is given."""

    prompt: Prompt


class VideoError(BaseModel):
    code: str
    message: str


class ShownState(BaseModel):
    """One state of a video, as `State` takes it."""

    text: str
    at: int | float | None
    duration: float | None
    negative: str | None


class Video(BaseModel):
    """A video and how far it is."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: Annotated[int, Field(ge=0, le=100)]
    created_at: int
    completed_at: int | None = None
    expires_at: int | None = None
    seconds: str
    size: str
    prompt: str
    remixed_from_video_id: str | None = None
    error: VideoError | None = None
    num_frames: int
    fps: float
    seed: int
    synopsis: list[str]
    states: list[ShownState] = Field(description="the synopsis with where its states stand, to be sent as one again")
    synopsis_source: str
    spread: str
    num_inference_steps: int
    guidance_scale: float
    eta: float
    negative_prompt: str
    tar: dict[str, Any] | None
    fast: list[str]
    embeddings: str | None
    priority: int
    metadata: dict[str, str]
    stage: str | None = Field(default=None, description="what runs now: text, denoise, decode or encode")
    step: int | None = None
    seconds_left: float | None = Field(default=None, description="as far as the steps so far tell")
    bytes: int | None = None
    sha256: str | None = Field(default=None, description="of the mp4")
    inference_seconds: dict[str, float] | None = Field(default=None, description="by stage")


class Videos(BaseModel):
    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(BaseModel):
    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "vstar-engine"
    facts: dict[str, Any]


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Error(BaseModel):
    message: str
    type: str
    code: str | None
    param: str | None


class Errors(BaseModel):
    error: Error
