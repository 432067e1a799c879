"""Does the physics earn its place? What is compared, how it is run, and what is drawn of it."""
