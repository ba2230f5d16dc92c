"""Fields of other servers that this API does not have, and what does it here."""

import re

# a video
VIDEO = {
    "duration": "seconds (or num_frames)",
    "length": "seconds (or num_frames)",
    "num_seconds": "seconds",
    "duration_seconds": "seconds",
    "frames": "num_frames",
    "n_frames": "num_frames",
    "frame_num": "num_frames",
    "num_video_frames": "num_frames",
    "video_length": "num_frames",
    "frame_rate": "fps",
    "framerate": "fps",
    "width": "size, as WIDTHxHEIGHT",
    "height": "size, as WIDTHxHEIGHT",
    "ratio": "size, as WIDTHxHEIGHT",
    "aspect_ratio": "size, as WIDTHxHEIGHT",
    "resolution": "size, as WIDTHxHEIGHT",
    "steps": "num_inference_steps",
    "num_steps": "num_inference_steps",
    "sample_steps": "num_inference_steps",
    "sampling_steps": "num_inference_steps",
    "inference_steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "true_cfg_scale": "guidance_scale",
    "random_seed": "seed",
    "noise_seed": "seed",
    "text": "prompt",
    "text_prompt": "prompt",
    "prompt_text": "prompt",
    "negative": "negative_prompt",
    "states": "synopsis",
    "strength": "tar.strength",
    "stream": "GET /v1/videos/{id}/events",
    "response_format": "GET /v1/videos/{id}/content",
    "callback_url": "GET /v1/videos/{id}/events",
    "webhook": "GET /v1/videos/{id}/events",
    **dict.fromkeys(
        ("n_variants", "num_videos", "num_outputs", "num_videos_per_prompt", "num_outputs_per_prompt", "sample_count"),
        "n, which is 1",
    ),
    **dict.fromkeys(("extra_params", "extra_body", "input", "parameters"), "the fields themselves, at the top of the body"),
    "fast": "the server's option --fast",
}
# a state of a synopsis
STATE = {
    **dict.fromkeys(("prompt", "description", "caption", "subprompt", "content"), "text"),
    **dict.fromkeys(("position", "frame", "start", "time"), "at"),
    **dict.fromkeys(("length", "seconds", "weight"), "duration"),
    "negative_prompt": "negative",
}
# pictures to begin with
PICTURES = ("input_reference", "image", "image_url", "init_image", "input_image", "first_frame_image")


def snake_case(name: str) -> str:
    """Returns numFrames and num-frames as num_frames."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).replace("-", "_").lower()


def unknown_field(name: str, known: tuple[str, ...] = (), of_state: bool = False) -> str:
    """Says that a field is unknown, and what does it here; `known` are the fields that stand at its place."""
    plain = snake_case(name.rpartition(".")[2])
    here = plain if plain in known else (STATE if of_state else VIDEO).get(plain)
    return f"there is no such field; here it is {here}" if here else "there is no such field"
