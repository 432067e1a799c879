"""A rank as a process: ranks and device, watchdog, the wish to stop, how it fails."""
