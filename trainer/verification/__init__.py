"""How good forecasts are: one pass over held-out samples, on any number of ranks."""
