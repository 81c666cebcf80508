"""Commands that print the figures of README.md and launch/README.md."""
