"""Trains the text tower to tell a scene's factors from a caption, linearly from every position that has read it all.

Factors being linear in the embedding, halfway between two states' embeddings lies the embedding of a state halfway.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tools.mini.data.captions import BLOCKS, caption
from tools.mini.data.scenes import sample
from vstar_engine.networks.text_encoder import TextTower
from vstar_engine.prompting.tokenizer import END, tokenize

from .loop import Loop, Run

WORDINGS = 16  # captions drawn per clip
BATCH = 96
FACTORS = sum(BLOCKS.values())


def initialise(tower: TextTower) -> None:
    """Small random matrices; a word never seen in training stays the zero vector and says nothing."""
    for name, value in tower.named_parameters():
        if "ln_" in name:
            continue
        if value.ndim < 2:
            nn.init.zeros_(value)
        elif name.startswith(("token_embedding", "positional")):
            nn.init.normal_(value, std=0.05)
        else:
            nn.init.normal_(value, std=0.7 * value.shape[1] ** -0.5)


def told(seeds: range, wordings: int = WORDINGS) -> tuple[Tensor, Tensor]:
    """Draws captions: tokens (clips, wordings, 77) and what they say (clips, wordings, 34)."""
    drawn = [caption(sample(seed), np.random.default_rng((seed, i))) for seed in seeds for i in range(wordings)]
    targets = torch.from_numpy(np.stack([one.target for one in drawn]))
    shape = (len(seeds), wordings, -1)
    return tokenize([one.text for one in drawn]).view(*shape), targets.view(*shape)


def kept_captions(folder: Path, seeds: range) -> tuple[Tensor, Tensor]:
    """Returns `told(seeds)`, kept in `folder`."""
    path = folder / f"captions-{seeds.start}-{seeds.stop}.pt"
    if not path.is_file():
        torch.save(told(seeds), path)
    return torch.load(path, weights_only=True)


def train(run: Run, seeds: range) -> TextTower:
    """Trains the tower; returns it with the embeddings of all unseen words at zero."""
    tokens, targets = (values.flatten(0, 1) for values in kept_captions(run.folder, seeds))
    tower, head = TextTower(run.spec.text), nn.Linear(run.spec.text.width, FACTORS)
    initialise(tower)
    loop = Loop(run, "text", nn.ModuleDict({"tower": tower, "head": head}), steps=run.steps("text"), rate=2e-3)

    def step(index: int, rng: np.random.Generator) -> dict[str, Tensor]:
        batch = torch.from_numpy(rng.integers(0, len(tokens), BATCH))
        read = tokens[batch]
        said = head(tower(read))  # (n, 77, factors)
        ends = (read == END).int().argmax(1, keepdim=True)
        read_mask = (torch.arange(read.shape[1]) >= ends)[..., None]
        error = (said - targets[batch][:, None]).square() * read_mask
        wrong = error.sum(-1).sum(1) / read_mask.sum((1, 2))
        return {"loss": wrong.mean()}

    loop.run(step)
    if not loop.finished:
        with torch.no_grad():
            unseen = torch.ones(run.spec.text.vocab_size, dtype=torch.bool)
            unseen[tokens.unique()] = False
            tower.token_embedding.weight[unseen] = 0.0
        loop.finish()
    return tower.eval().requires_grad_(False)


@torch.no_grad()
def embedded(tower: TextTower, tokens: Tensor) -> Tensor:
    """Encodes (clips, wordings, 77) tokens: (clips, wordings, 77, width) float16."""
    flat = tokens.flatten(0, 1)
    return torch.cat([tower(part).half() for part in flat.split(256)]).unflatten(0, tokens.shape[:2])
