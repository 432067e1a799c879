"""Grids of latitude and longitude, and the weights between them."""
