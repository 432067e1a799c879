"""Where the air of every patch comes from."""
