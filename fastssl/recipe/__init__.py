"""A run described in full: typed, frozen, validated at once, every default in one place."""
