"""The zarr store: layout, writing, opening, reading."""
