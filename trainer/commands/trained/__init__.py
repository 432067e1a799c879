"""Commands on networks that have been trained."""
