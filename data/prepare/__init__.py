"""Files of a reanalysis -> store."""
