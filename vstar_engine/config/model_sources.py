"""Where models are published: their place on the Hub, their size, and their licence."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSource:
    """A model on the Hub: `id`, the `revision` that was seen there (None: none is known), and one `file` or a diffusers folder.

    `bytes` is what is fetched; `parameters` counts those of the UNet, the autoencoder and the text tower.
    """

    id: str
    licence: str
    bytes: int
    parameters: int
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        revision, file = (f"@{self.revision}" if self.revision else "", f":{self.file}" if self.file else "")
        return f"{self.id}{revision}{file}"


SOURCES = {
    "videocrafter2": ModelSource(
        "VideoCrafter/VideoCrafter2",
        "apache-2.0 by its card, research and non-commercial use by the authors' text",
        7_400_000_000,
        1_850_970_924,
        "7b4079838622fcba3fc2c9575210df3ed1cb8d69",
        "model.ckpt",
    ),
    "modelscope": ModelSource(
        "ali-vilab/text-to-video-ms-1.7b",
        "CC-BY-NC-4.0, no commercial use",
        7_341_000_000,
        1_835_275_563,
        "8227dddca75a8561bf858d604cc5dae52b954d01",
    ),
    "zeroscope": ModelSource("cerspense/zeroscope_v2_576w", "CC-BY-NC-4.0, no commercial use", 7_341_000_000, 1_835_275_563),
}


def model_of_id(id: str) -> str | None:
    """Returns the model that is published under an id, without its revision and file; None where none is known."""
    found = [model for model, source in SOURCES.items() if source.id.lower() == id.lower()]
    return found[0] if found else None
