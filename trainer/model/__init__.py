"""The network: pure torch, and its numbers."""
