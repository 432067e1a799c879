"""How the files of a source call, place and date things."""
