"""LiteLLM's video calls on a server: a process of test_serving_tools.py, in LiteLLM's own environment."""

import json
import sys
import time
from typing import Any

import litellm

WHERE: dict[str, Any] = {"custom_llm_provider": "openai", "api_base": f"{sys.argv[1]}/v1", "api_key": "none"}


def ended(id: str) -> str:
    """Waits for a video's end."""
    limit = time.monotonic() + 60
    while (status := litellm.video_status(video_id=id, **WHERE).status) not in ("completed", "failed"):
        assert time.monotonic() < limit, status
        time.sleep(0.2)
    return str(status)


small = {"num_frames": 4, "num_inference_steps": 2}
first = litellm.video_generation(
    model="openai/mini", prompt="a red meadow", seconds="1", size="64x32", extra_body=small, **WHERE
)
ends = [ended(first.id)]
content = litellm.video_content(video_id=first.id, **WHERE)
again = litellm.video_remix(video_id=first.id, prompt="a blue meadow", **WHERE)
ends.append(ended(again.id))
listed = len(litellm.video_list(**WHERE)["data"])
print(json.dumps({"ends": ends, "content": content[4:8].decode(), "listed": listed, "remix_of": again.remixed_from_video_id}))
