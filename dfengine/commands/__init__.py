"""One module per CLI command: what the command does, free of option parsing."""
