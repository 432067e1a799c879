"""Options and printing of `python -m data COMMAND`, a file a command."""
