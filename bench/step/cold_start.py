"""One cold start, measured in a process of its own: prints a line of JSON.

`python -m vstar_engine.bench.step.cold_start '{"model": "mini", "weights": null, "frames": 16, "device": "cpu",
"dtype": "float32"}'`: seconds to import the engine, load the model and take the first and the second guided step, and the
most memory the process held.
"""

import json
import resource
import sys
import time

BEGUN = time.perf_counter()


def main() -> None:
    given = json.loads(sys.argv[1])

    import torch

    from vstar_engine.config.request import Request
    from vstar_engine.engine import Engine
    from vstar_engine.sampling.batch import Batch, BatchRow

    imported = time.perf_counter()
    engine = Engine.load(given["model"], given["weights"], device=given["device"], dtype=given["dtype"])
    if given["device"] != "cpu":
        torch.cuda.synchronize()
    loaded = time.perf_counter()
    request = Request(("a landscape",), frames=given["frames"]).fitted(engine.spec)
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
    device_bytes = torch.cuda.max_memory_allocated() if given["device"] != "cpu" else None
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
