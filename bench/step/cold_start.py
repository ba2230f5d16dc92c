"""One cold start, measured in a process of its own: prints a line of JSON.

`python -m vstar_engine.bench.step.cold_start MODEL [WEIGHTS]`: seconds to import the engine, load the model and take the
first and the second guided step, and the most memory the process held.
"""

import argparse
import json
import resource
import time

BEGUN = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vstar_engine.bench.step.cold_start", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("weights", nargs="?")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()

    import torch

    from vstar_engine.config.request import Request
    from vstar_engine.engine import Engine
    from vstar_engine.sampling.batch import Batch, BatchRow

    imported = time.perf_counter()
    engine = Engine.load(args.model, args.weights, device=args.device, dtype=args.dtype)
    if args.device != "cpu":
        torch.cuda.synchronize()
    loaded = time.perf_counter()
    request = Request(("a landscape",), frames=args.frames).fitted(engine.spec)
    text = torch.randn(1, 1, engine.spec.text.context_length, engine.spec.unet.context_dim, device=engine.device)
    text = text.to(engine.dtype)
    row = BatchRow.of(0, request, None, text, text, engine.spec)
    batch = Batch(engine.denoiser, engine.spec, engine.dtype, [row])
    steps = []
    for _ in range(2):
        start = time.perf_counter()
        batch.step()
        float(row.latents.sum())
        steps.append(time.perf_counter() - start)
    device_bytes = torch.cuda.max_memory_allocated() if args.device != "cpu" else None
    found = {
        "import": imported - BEGUN,
        "load": loaded - imported,
        "first_step": steps[0],
        "second_step": steps[1],
        "host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "device_bytes": device_bytes,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
