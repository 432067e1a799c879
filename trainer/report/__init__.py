"""A run on paper: pictures of its training and its scores, and one page that holds them all."""
