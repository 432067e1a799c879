"""What a forecast must beat: what needs no network."""
