"""From uint8 images to normalized views: draws, policy, and three backends that agree pixel by pixel."""
