"""Orders and sectors along the wind, and their cache."""
