"""What a run is while it runs."""
