"""Denoises a video of the mini model for each line that it reads, and prints the seconds.

`python -m vstar_engine.bench.step.busy_video FRAMES STEPS`
What its threads do while they wait is in its environment: it sets nothing.
"""

import argparse
import json
import sys

from vstar_engine import Engine, Sampling

STATES = ["deep snow, bare trees", "flowers bloom"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vstar_engine.bench.step.busy_video", description=__doc__)
    parser.add_argument("frames", type=int)
    parser.add_argument("steps", type=int)
    args = parser.parse_args()
    engine = Engine.load("mini")
    for _ in sys.stdin:
        video = engine.generate(STATES, frames=args.frames, seed=0, sampling=Sampling(steps=args.steps))
        print(json.dumps(video.seconds["denoise"]), flush=True)


if __name__ == "__main__":
    main()
