"""Where it runs: the command line, presets and clusters."""
