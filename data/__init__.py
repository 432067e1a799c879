"""Everything that is read: the zarr store, the wind-scan cache and the sample stream. Never imports `trainer`."""


class DataError(Exception):
    """Something that is read is missing, stale or impossible; the message names it and the remedy."""
