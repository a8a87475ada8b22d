"""A run's directory: its files, checkpoints, and reading them back."""
