"""Checkpoints: how they are committed, what a run must remember, and whether ranks agree. Knows tensors and files only."""
