"""Under the training loop: ranks, seeds, signals, progress, the engine and the head."""
