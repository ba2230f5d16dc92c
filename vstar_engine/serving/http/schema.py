"""The bodies of the API: OpenAI's Videos API and the settings of this engine."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, create_model, model_validator

from vstar_engine.config.video_fields import BODY, STATE, TAR, VideoField, fields_at, unchanged
from vstar_engine.config.windows import LONGEST

from .field_values import Truth, as_list, as_note, as_preset, as_whole, choice, number
from .other_clients import DRAWN, SEED_RANGE

LONGEST_PROMPT, LONGEST_STATE, MOST_STATES = 2000, 1000, 32
NO_NUL = r"^[^\x00]*$"
SECONDS, SIZE = r"^[1-9][0-9]{0,2}$", r"^[1-9][0-9]{1,3}x[1-9][0-9]{1,3}$"
# what `other_clients` makes them of, for the OpenAPI document
SENT_SECONDS = r"^\s*0*[0-9]{1,3}(\.0*)?\s*(s|sec|seconds)?\s*$"
SENT_SIZE = r"^\s*([0-9]{1,5}\s*[xX*\u00d7]\s*[0-9]{1,5}|[aA][uU][tT][oO])?\s*$"
LEVEL = r"^[0-9]$"
BUNDLE = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"


def _seen(words: str) -> str:
    if not words.strip():
        raise ValueError("this text is blank; describe what the video shows")
    return words


Prompt = Annotated[str, Field(min_length=1, max_length=LONGEST_PROMPT, pattern=NO_NUL), AfterValidator(_seen)]
Text = Annotated[str, Field(max_length=LONGEST_PROMPT, pattern=NO_NUL)]
Words = Annotated[str, Field(min_length=1, max_length=LONGEST_STATE, pattern=NO_NUL), AfterValidator(_seen)]
Label = Annotated[str, Field(min_length=1, max_length=64, pattern=NO_NUL)]
Note = Annotated[str, Field(max_length=512, pattern=NO_NUL)]
Priority: Any = number(int, ge=-10, le=10)
One: Any = number(int, ge=1, le=1)
Sigma: Any = number(float, gt=0, le=1e6, allow_inf_nan=False)
Level = Annotated[str, Field(pattern=LEVEL)]
# what is taken for settings that JSON spells otherwise than the engine, by their names in the API
TYPES: dict[str | None, Any] = {
    "size": Annotated[str, Field(pattern=SIZE, json_schema_extra={"pattern": SENT_SIZE})],
    "seed": number(int, ge=DRAWN, lt=SEED_RANGE),
    "synopsis.text": Words,
    "synopsis.at": Annotated[int, Field(ge=0, lt=LONGEST)]
    | Annotated[float, Field(ge=0, le=1)]
    | Annotated[str, Field(max_length=20)],
    "tar.preset": Annotated[str, Field(max_length=40)],
    "tar.sigma": Sigma | dict[Level, Sigma],
    "tar.until": Annotated[
        Annotated[int, Field(ge=-1, le=1000)] | Annotated[str, Field(pattern=r"^[0-9]{1,4}%?$")], BeforeValidator(as_whole)
    ],
}


class Strict(BaseModel):
    """A body that refuses unknown fields."""

    model_config = ConfigDict(extra="forbid")


def _taken(row: VideoField) -> Any:
    """Returns the type of a setting in a body."""
    if row.http in TYPES:
        return TYPES[row.http]
    if row.choices:
        return choice(row.choices)
    if row.value_type in (str, bool):
        return {str: Text, bool: Truth}[row.value_type]
    return number(row.value_type, **row.bounds, **({"allow_inf_nan": False} if row.value_type is float else {}))


def _fields(place: str) -> Any:
    """Returns a model of the settings at a place of a body; all but a state's text are optional."""
    made: dict[str, Any] = {}
    for row in fields_at(place):
        if row.settable:
            kind, said = _taken(row), row.http_help or row.help
            needed = row.path == "states"
            made[row.http_name] = (kind, Field(description=said)) if needed else (kind | None, Field(None, description=said))
    return create_model("Fields", __base__=Strict, **made)


_State: Any = _fields(STATE)
_Tar: Any = _fields(TAR)
_Video: Any = _fields(BODY)


class State(_State):
    """One state of a synopsis."""


class TarSettings(_Tar):
    """Temporal attention regularisation. A smaller sigma means more motion."""


States = Annotated[list[Words | State], Field(min_length=1, max_length=MOST_STATES)]
OneLine = Annotated[str, Field(min_length=1, max_length=LONGEST_STATE, pattern=r"^[^\x00\n]*$")]
Synopsis = Annotated[States, BeforeValidator(as_list, json_schema_input_type=States | OneLine)]
Preset = Annotated[str, Field(max_length=40)]
TarGiven = Annotated[
    Preset | TarSettings, BeforeValidator(as_preset, json_schema_input_type=Preset | Literal[False] | TarSettings)
]
AnyNote = Annotated[Note, BeforeValidator(as_note, json_schema_input_type=Note | int | float)]


class VideoSettings(_Video):
    """All settings of a video except its prompt."""

    model: Annotated[str, Field(max_length=100)] | None = None
    seconds: (
        Annotated[int, Field(ge=1, le=600)]
        | Annotated[str, Field(pattern=SECONDS, json_schema_extra={"pattern": SENT_SECONDS})]
        | None
    ) = Field(default=None, description="length of the video; num_frames overrides it")
    synopsis: Synopsis | None = Field(default=None, description="the states of the video, in order")
    subprompts: Synopsis | None = Field(default=None, description="another name of synopsis")
    tar: TarGiven | None = None
    embeddings: Annotated[str, Field(pattern=BUNDLE)] | None = Field(
        default=None, description="id of precomputed embeddings on the server"
    )
    enhance_prompt: Truth | None = Field(
        default=None, description="turn the prompt into states; true by default without a synopsis"
    )
    priority: Priority | None = Field(default=None, description="jobs of higher priority run earlier")
    metadata: Annotated[dict[Label, AnyNote], Field(max_length=16)] | None = None
    # sent by clients of other servers; ignored
    user: Annotated[str, Field(max_length=512)] | None = None
    quality: Annotated[str, Field(max_length=64)] | None = None
    n: One | None = None

    @model_validator(mode="after")
    def _one_synopsis(self) -> "VideoSettings":
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


class CreateVideo(VideoSettings):
    """A video to make."""

    prompt: Prompt | None = Field(default=None, description="optional with a synopsis or embeddings")

    @model_validator(mode="after")
    def _something(self) -> "CreateVideo":
        if self.prompt is None and self.states is None and self.embeddings is None:
            raise ValueError("give a prompt")
        return self


class RemixVideo(VideoSettings):
    """A video to make again with another prompt; other settings stay unless given."""

    prompt: Prompt


class VideoError(BaseModel):
    code: str
    message: str


def _shown_fields(place: str) -> Any:
    """Returns a model of the settings at a place of an answer; a state's settings but its text may be null."""
    made: dict[str, Any] = {}
    for row in fields_at(place):
        kind: Any = row.value_type if row.to_http is unchanged else str
        if place == STATE:
            kind = kind if row.path == "states" else kind | None
        elif row.optional and row.to_http is unchanged:
            kind = kind | None
        elif row.many:
            kind = list[kind]
        made[row.http_name] = (kind, ...)
    return create_model("Fields", **made)


_ShownVideo: Any = _shown_fields(BODY)
_ShownState: Any = _shown_fields(STATE)


class ShownState(_ShownState):
    """One state of a video, with the fields of `State`."""


class VideoObject(_ShownVideo):
    """A video and its progress."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: Annotated[int, Field(ge=0, le=100)]
    created_at: int
    completed_at: int | None = None
    expires_at: int | None = None
    seconds: str
    prompt: str
    remixed_from_video_id: str | None = None
    error: VideoError | None = None
    synopsis: list[str]
    states: list[ShownState] = Field(description="the states with their settings, as `synopsis` takes them")
    synopsis_source: str
    tar: dict[str, Any] | None
    embeddings: str | None
    priority: int
    metadata: dict[str, str]
    stage: str | None = Field(default=None, description="running stage: text, denoise, decode or encode")
    step: int | None = None
    seconds_left: float | None = Field(default=None, description="estimated from the steps so far")
    bytes: int | None = None
    sha256: str | None = Field(default=None, description="of the mp4")
    inference_seconds: dict[str, float] | None = Field(default=None, description="by stage")


class VideoList(BaseModel):
    object: Literal["list"] = "list"
    data: list[VideoObject]
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
