"""How good a trained network is: splits, features once, every probe, fine-tuning."""
