"""The start state as trainable parameters: losses, masks, upscaled states, state arithmetic."""
