"""What the network is given of one sample: analyses, earlier and later ones, the sun and the season."""
