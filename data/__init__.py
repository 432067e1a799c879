"""Everything that is read: the zarr store, the wind-scan cache and the sample stream. Never imports `trainer`."""


class Refusal(Exception):
    """Something that was given is wrong: the message names it, where it is, and what to do; no traceback is of use."""


class DataError(Refusal):
    """Something that is read is missing, stale or impossible."""
