"""What an evaluation is given beside the run: regions, forecast weather, observations of stations."""
