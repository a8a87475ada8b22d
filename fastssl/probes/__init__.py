"""Pure functions of frozen features: kNN, ridge, linear probe, spectrum."""
