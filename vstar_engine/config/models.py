"""Networks' architectures, and the table of known models."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

MAX_SIDE = 4096


# names for options; machine.device and networks.spatial_attention map them to what PyTorch has
DTYPE_NAMES = ("float32", "float16", "bfloat16")


ATTENTION_NAMES = ("auto", "sdpa", "xformers")


@dataclass(frozen=True)
class UNetSpec:
    """The video UNet's architecture.

    Level `i` works at the latent size divided by 2**i and has `model_channels * channel_mult[i]` channels.
    `image_tokens` is the number of tokens that each cross-attention mixes into the text, 0 for none.
    """

    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_levels: tuple[int, ...] = (0, 1, 2)
    head_dim: int = 64
    context_dim: int = 1024
    transformer_depth: int = 1
    in_channels: int = 4
    out_channels: int = 4
    use_linear: bool = True
    temporal_conv: bool = True
    init_attention: bool = True
    fps_condition: bool = True
    norm_groups: int = 32
    image_tokens: int = 0

    @property
    def levels(self) -> int:
        return len(self.channel_mult)


@dataclass(frozen=True)
class VaeSpec:
    """The KL autoencoder's architecture; a latent cell covers `factor` x `factor` pixels."""

    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 4
    embed_dim: int = 4
    in_channels: int = 3
    out_channels: int = 3
    scale_factor: float = 0.18215
    norm_groups: int = 32

    @property
    def factor(self) -> int:
        return 2 ** (len(self.channel_mult) - 1)


# how prompts become CLIP's tokens: as OpenCLIP cleans and pads them, or as transformers does
TOKENIZERS = OPENCLIP, TRANSFORMERS = ("openclip", "transformers")


@dataclass(frozen=True)
class TextSpec:
    """The OpenCLIP text tower's architecture, whose last layer is not used, and its tokenizer: a kind and the padding token."""

    width: int = 1024
    heads: int = 16
    layers: int = 24
    vocab_size: int = 49408
    context_length: int = 77
    tokenizer: str = OPENCLIP
    pad: int = 0


# what a network predicts: the noise, or v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x0 (arXiv 2202.00512)
EPS, V = "eps", "v"


@dataclass(frozen=True)
class NoiseSpec:
    """The noise that a network was trained on, and what it predicts.

    Betas are linear in their square roots. `offset` is added to timesteps. The last step ends at the first alpha_bar, or at 1
    where `last_is_clean`. `rescale` is VideoCrafter2's dynamic rescale of the clean latents.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction: str = EPS
    offset: int = 1
    last_is_clean: bool = False
    rescale: bool = True


@dataclass(frozen=True)
class ImageSpec:
    """The OpenCLIP image tower's architecture; `size` and `patch` are in pixels."""

    size: int = 224
    patch: int = 14
    width: int = 1280
    layers: int = 32
    heads: int = 16
    out: int = 1024


@dataclass(frozen=True)
class StreamingSpec:
    """What StreamingT2V (arXiv 2403.14773) adds to a text-to-video model.

    A chunk has `chunk` frames, of which the first `overlap` repeat the last of the chunk before. `pixel_channels` are the
    widths of the pixel encoder, each step but the first at half the size; `resampler` is the width inside the resampler.
    """

    image: ImageSpec = field(default_factory=ImageSpec)
    pixel_channels: tuple[int, ...] = (32, 96, 256, 512)
    resampler: int = 1280
    chunk: int = 16
    overlap: int = 8


@dataclass(frozen=True)
class Spec:
    """A model: its networks, its noise, and the size in pixels, (height, width), and the frames it was trained on.

    `defaults` has the settings of `Sampling` whose defaults are the model's own: those of its published pipeline. `streaming`
    is None for a model that makes a video in one piece.
    """

    name: str
    unet: UNetSpec
    vae: VaeSpec
    text: TextSpec
    size: tuple[int, int]
    noise: NoiseSpec = NoiseSpec()
    frames: int = 16
    defaults: tuple[tuple[str, Any], ...] = ()
    streaming: StreamingSpec | None = None

    @property
    def multiple(self) -> int:
        """Returns the number of pixels that both sides of a video must be multiples of."""
        return self.vae.factor * 2 ** (self.unet.levels - 1)

    def check_size(self, height: int, width: int) -> None:
        """Raises ValueError unless the network can take a `height` x `width` video."""
        wanted = f"a size is HEIGHTxWIDTH with both sides multiples of {self.multiple} from {self.multiple} to {MAX_SIDE}"
        for side in (height, width):
            if not self.multiple <= side <= MAX_SIDE or side % self.multiple:
                raise ValueError(f"{wanted} for model {self.name}, got {height}x{width}")


_MODELSCOPE_PARTS = (UNetSpec(fps_condition=False), VaeSpec(), TextSpec(tokenizer=TRANSFORMERS))

MODELS: dict[str, Spec] = {
    "videocrafter2": Spec("videocrafter2", UNetSpec(), VaeSpec(), TextSpec(), size=(320, 512)),
    # 8 groups: with one channel to a group a norm would take each frame's light and colour away
    "mini": Spec(
        "mini",
        UNetSpec(model_channels=32, channel_mult=(1, 2, 4), num_res_blocks=1, head_dim=16, context_dim=64, norm_groups=8),
        VaeSpec(channels=32, channel_mult=(1, 1, 2, 4), num_res_blocks=1, norm_groups=8),
        TextSpec(width=64, heads=4, layers=4),
        size=(96, 128),
    ),
    "modelscope": Spec(
        "modelscope",
        *_MODELSCOPE_PARTS,
        size=(256, 256),
        noise=NoiseSpec(rescale=False),
        defaults=(("steps", 50), ("guidance", 9.0)),
    ),
    "zeroscope": Spec(
        "zeroscope",
        *_MODELSCOPE_PARTS,
        size=(320, 576),
        noise=NoiseSpec(rescale=False),
        frames=24,
        defaults=(("steps", 40), ("guidance", 9.0)),
    ),
    "streaming-t2v": Spec(
        "streaming-t2v",
        UNetSpec(fps_condition=False, image_tokens=16),
        VaeSpec(),
        TextSpec(),
        size=(256, 256),
        noise=NoiseSpec(rescale=False),
        defaults=(("steps", 50), ("guidance", 7.5)),
        streaming=StreamingSpec(),
    ),
}


def parse_size(text: str) -> tuple[int, int]:
    """Reads HEIGHTxWIDTH in pixels."""
    height, x, width = text.lower().partition("x")
    if not (x and height.isdecimal() and width.isdecimal()):
        raise ValueError(f"a size is HEIGHTxWIDTH, such as 320x512, got {text!r}")
    return int(height), int(width)


def model_named(name: str) -> Spec:
    """Looks a model up by name; ValueError lists the known ones."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; known models: {', '.join(MODELS)}")
    return MODELS[name]


# the parts of a `Spec` that a folder of weights may state in the table's place
_STATED = {"unet": UNetSpec, "vae": VaeSpec, "text": TextSpec, "noise": NoiseSpec}


def networks_as_json(spec: Spec) -> dict[str, Any]:
    """Returns the networks and the noise of a model as plain values, for a manifest."""
    return {name: asdict(getattr(spec, name)) for name in _STATED}


def with_networks(spec: Spec, stated: Mapping[str, Any]) -> Spec:
    """Returns a model with the networks and the noise that `networks_as_json` wrote; ValueError for others."""
    try:
        parts = {
            name: kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in stated[name].items()})
            for name, kind in _STATED.items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the networks are not stated as this version states them ({error})") from error
    return replace(spec, **parts)
