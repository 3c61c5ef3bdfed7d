"""The `fastdiff` command: one file for each subcommand."""
