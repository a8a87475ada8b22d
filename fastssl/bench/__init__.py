"""Measurements: this machine against its own ceilings, one stage's variants side by side, time to accuracy."""
