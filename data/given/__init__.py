"""What a person gives to a trained network: analyses, forecasts of others, observations, regions."""
