"""From uint8 images to normalised views: draws, policy, and three appliers that agree pixel by pixel."""
