"""What a person gives to a trained network: analyses, forecasts, observations, regions."""
