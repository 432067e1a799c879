"""Everything that learns: the model, the loop, checkpoints and the commands around them."""
