"""The trainer, its arguments, and what it needs for long runs: batches, callbacks, checkpoints, resuming."""
