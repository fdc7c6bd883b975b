"""One step of a VAE 784-400-20, by one process and by two that share its batch: time on the clock and of the processor.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 benchmarks/processes.py

Prints, and writes no result: two processes on one machine show what sharing costs, not what it gains.
"""

from __future__ import annotations

import time

import torch
from lightning_fabric import Fabric

import ppl_gen as pg
from ppl_gen.inference import SVI
from ppl_gen.models import vae

SKIPPED, STEPS = 20, 150  # steps at the beginning, which are checked and captured; all steps


def step(rows: torch.Tensor, size: int, fabric: Fabric | None) -> str:
    """Milliseconds of this process for one step, after the first."""
    seen: list[tuple[float, float]] = []

    def note(_step: int, _info: object) -> None:
        seen.append((time.perf_counter(), time.process_time()))

    algorithm = SVI(steps=STEPS, batch_size=size)
    pg.fit(vae(latent=20, hidden=400), rows, algorithm, fabric=fabric, callbacks=[note], progress=False)
    spent = (1e3 * (last - first) / (STEPS - SKIPPED) for first, last in zip(seen[SKIPPED - 1], seen[-1], strict=True))
    return "clock {:.1f} ms, processor {:.1f} ms".format(*spent)


def main() -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    rows = (torch.rand(6000, 784, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    for size in (128, 1024):
        for _ in range(3):  # they take turns
            if fabric.is_global_zero:
                print(f"batch {size}: one process alone: {step(rows, size, None)}", flush=True)
            fabric.barrier()
            found = step(rows, size, fabric)
            if fabric.is_global_zero:
                print(f"batch {size}: each of two:       {found}", flush=True)
            fabric.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
