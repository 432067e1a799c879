"""This process among others: which rank it is, what it may write, and how a file appears whole."""
