"""The process around a fit: files replaced in one step, interrupts, worker processes, progress bars, notebooks."""
