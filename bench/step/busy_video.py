"""Denoises a video of the mini model for each line that it reads, and prints the seconds.

`python -m vstar_engine.bench.step.busy_video FRAMES STEPS`
What its threads do while they wait is in its environment: it sets nothing.
"""

import json
import sys

from vstar_engine import Engine, Sampling

STATES = ["deep snow, bare trees", "flowers bloom"]


def main() -> None:
    frames, steps = map(int, sys.argv[1:])
    engine = Engine.load("mini")
    for _ in sys.stdin:
        video = engine.generate(STATES, frames=frames, seed=0, sampling=Sampling(steps=steps))
        print(json.dumps(video.seconds["denoise"]), flush=True)


if __name__ == "__main__":
    main()
