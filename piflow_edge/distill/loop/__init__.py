"""The training loop: processes, checkpoints, journal."""
