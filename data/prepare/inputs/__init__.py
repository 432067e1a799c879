"""The files that were given: which they are, whether they are whole, whether they are still the same."""
