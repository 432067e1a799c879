"""Commands of the wind scan."""
