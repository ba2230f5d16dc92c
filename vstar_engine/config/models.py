"""Networks' architectures, and the table of known models."""

from dataclasses import dataclass, field

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


@dataclass(frozen=True)
class TextSpec:
    """The OpenCLIP text tower's architecture."""

    width: int = 1024
    heads: int = 16
    layers: int = 24
    vocab_size: int = 49408
    context_length: int = 77


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
    """A model: its networks and the size in pixels, (height, width), that it was trained on.

    `streaming` is None for a model that makes a video in one piece.
    """

    name: str
    unet: UNetSpec
    vae: VaeSpec
    text: TextSpec
    size: tuple[int, int]
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
    "streaming-t2v": Spec(
        "streaming-t2v",
        UNetSpec(fps_condition=False, image_tokens=16),
        VaeSpec(),
        TextSpec(),
        size=(256, 256),
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
