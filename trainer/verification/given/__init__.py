"""What scripts of users import from here; it lives in data/given/."""
