"""The `specopt` command."""
