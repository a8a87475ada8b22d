"""Features of every image of a source, written as a table."""
