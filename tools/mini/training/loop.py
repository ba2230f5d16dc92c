"""One training loop for every part: AdamW, warm-up and cosine decay, averaged weights, a checkpoint to resume from, a log.

Products run in bfloat16, which some CPUs multiply natively; weights, their averages and losses stay in fp32.
"""

import json
import math
import time
import zlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from vstar_engine.artifacts.files import write_aside
from vstar_engine.config.models import Spec

STEPS = {"vae": 2500, "text": 1200, "unet": 3200, "decoder": 1200, "probe": 500}
KEEP_SECONDS = 120
LOG_EVERY = 25
WARM_UP = 100

Step = Callable[[int, np.random.Generator], dict[str, Tensor]]


@dataclass(frozen=True)
class Run:
    """One training run: the model, its folder, and a factor on all step counts (below 1 for a rehearsal)."""

    spec: Spec
    folder: Path
    scale: float = 1.0

    def steps(self, part: str) -> int:
        return max(2, round(STEPS[part] * self.scale))


class Loop:
    """Trains `module` for `steps` steps, from its last checkpoint if there is one.

    With `average` above 0 the weights at the end are an exponential moving average over about 1 / (1 - average) steps.
    """

    def __init__(self, run: Run, part: str, module: nn.Module, steps: int, rate: float, average: float = 0.0):
        self.part, self.module, self.steps, self.rate, self.average = part, module, steps, rate, average
        self.path, self.log = run.folder / f"{part}.pt", run.folder / f"{part}.jsonl"
        self.optimizer = torch.optim.AdamW(self.groups(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.averaged = {name: value.detach().clone() for name, value in module.state_dict().items()} if average else {}
        self.index, self.seconds, self.finished = 0, 0.0, False
        if self.path.is_file():
            self.restore()

    def groups(self) -> list[dict]:
        return [{"params": list(self.module.parameters())}]

    def restore(self) -> None:
        kept = torch.load(self.path, weights_only=True)
        self.module.load_state_dict(kept["module"])
        self.index, self.seconds, self.finished = kept["index"], kept["seconds"], kept["finished"]
        if not self.finished:
            self.optimizer.load_state_dict(kept["optimizer"])
            self.averaged = kept["averaged"]
        rows = [row for row in self.log.read_text().splitlines() if json.loads(row)["step"] <= self.index]
        self.log.write_text("".join(f"{row}\n" for row in rows))

    def keep(self) -> None:
        """Writes a checkpoint aside and renames it, so that a stop at any moment leaves a whole one."""
        kept = {"module": self.module.state_dict(), "index": self.index, "seconds": self.seconds, "finished": self.finished}
        if not self.finished:
            kept |= {"optimizer": self.optimizer.state_dict(), "averaged": self.averaged}
        with write_aside(self.path) as aside:
            torch.save(kept, aside)

    def finish(self) -> None:
        """Marks the part as done; only its final weights are kept."""
        self.finished = True
        self.keep()

    def learning_rate(self) -> float:
        warm = min(1.0, (self.index + 1) / WARM_UP)
        return self.rate * warm * (0.02 + 0.49 * (1 + math.cos(math.pi * self.index / self.steps)))

    def update(self) -> None:
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        rate = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("scale", 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            decay = min(self.average, (self.index + 1) / (self.index + 10))
            state = self.module.state_dict()
            with torch.no_grad():
                torch._foreach_lerp_(list(self.averaged.values()), [state[name] for name in self.averaged], 1 - decay)

    def run(self, step: Step) -> None:
        """Runs what is left of the steps; `step(index, rng)` gives the losses, of which "loss" is minimised."""
        if self.finished:
            return
        self.module.train()
        sums: dict[str, list[float]] = defaultdict(list)
        began = kept = time.monotonic()
        before = self.seconds
        with tqdm(total=self.steps, initial=self.index, desc=self.part, mininterval=10) as bar:
            while self.index < self.steps:
                seed = zlib.crc32(f"{self.part}:{self.index}".encode())
                torch.manual_seed(seed)
                with torch.autocast("cpu", torch.bfloat16):
                    losses = step(self.index, np.random.default_rng(seed))
                losses["loss"].backward()
                self.update()
                self.index += 1
                bar.update()
                for name, value in losses.items():
                    sums[name].append(float(value.detach()))
                now = time.monotonic()
                self.seconds = before + now - began
                if self.index % LOG_EVERY == 0 or self.index == self.steps:
                    self.write({name: float(np.mean(values)) for name, values in sums.items()})
                    sums.clear()
                if now - kept > KEEP_SECONDS:
                    kept = now
                    self.keep()
        if self.average:
            self.module.load_state_dict(self.averaged)
            self.averaged = {}

    def write(self, means: dict[str, float]) -> None:
        row = {"step": self.index, "minutes": round(self.seconds / 60, 2)} | {k: round(v, 5) for k, v in means.items()}
        with self.log.open("a") as file:
            file.write(json.dumps(row) + "\n")
