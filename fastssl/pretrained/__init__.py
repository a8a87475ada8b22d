"""What one does with a trained network: load it, embed images, evaluate it, export it."""
