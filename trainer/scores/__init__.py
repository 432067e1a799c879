"""Loss, errors and skill."""
