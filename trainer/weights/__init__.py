"""Weights of any file: read without executing anything, translated and matched with our network, completely or not at all."""
