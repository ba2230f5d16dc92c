"""A motion dial and a timeline of prompts for pipelines of Hugging Face's diffusers."""

from .dials import Dial, dial
from .settings import DialSettings
from .timelines import Timeline, timeline

__all__ = ["Dial", "DialSettings", "Timeline", "dial", "timeline"]
