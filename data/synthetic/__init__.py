"""A small reanalysis over real terrain."""
