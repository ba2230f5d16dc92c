"""Runs a built engine and eager on the same inputs, three times each: a child of test_tensorrt_gpu.py.

`python tests/support/engine_parity.py ENGINE [WEIGHTS]` prints the errors against float64 as JSON.
"""

import json
import sys

import torch

from support.accuracy import relative_error
from vstar_engine import Engine
from vstar_engine.backends import eager
from vstar_engine.loading import open_weights

# lengths of both profiles, and the second one again after others
FRAMES = (1, 3, 16, 17, 32, 3)


def inputs(spec, size, frames, batch=2):
    """Every item of the batch has its own timestep, context, frame rate and rows of tar."""
    height, width = (side // spec.vae.factor for side in size)
    return [
        torch.randn(batch, spec.unet.in_channels, frames, height, width),
        torch.randint(0, 1000, (batch, 1)),
        torch.randn(batch, frames, spec.text.context_length, spec.unet.context_dim),
        torch.randint(8, 30, (batch,)),
        torch.rand(batch, spec.unet.levels, frames),
    ]


@torch.inference_mode()
def main(folder: str, weights: str | None = None) -> dict:
    torch.manual_seed(0)
    engine = Engine.load(engine=folder, weights=weights)
    tensors, size = open_weights(engine.spec, weights), engine.artifact.identity["size"]
    plain = eager.load(engine.spec, tensors, device=engine.device, dtype=engine.dtype)
    # no kernel of ours computes in float64
    exact = eager.load(engine.spec, tensors, device=torch.device("cpu"), dtype=torch.float64)

    def moved(latents, timestep, context, fps, tar):
        given = latents.to(engine.dtype), timestep, context.to(engine.dtype), fps, tar
        return [x.to(engine.device) for x in given]

    rows = []
    for frames in FRAMES:
        errors = []
        first = inputs(engine.spec, size, frames)
        for given in (first, inputs(engine.spec, size, frames), first):
            ours = engine.denoiser(*moved(*given)).cpu()
            wide = exact(given[0].double(), given[1], given[2].double(), *given[3:])
            errors.append(relative_error(ours, wide))
            last = ours
            if len(errors) == 1:
                enqueued, eagers = ours, relative_error(plain(*moved(*given)).cpu(), wide)
        bar = 2 * eagers + torch.finfo(engine.dtype).eps
        rows.append({"frames": frames, "errors": errors, "bar": bar, "same": torch.equal(enqueued, last)})
    return {"rows": rows}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
