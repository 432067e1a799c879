"""Weights from anywhere: read, compared with a run and matched, completely or not at all."""
