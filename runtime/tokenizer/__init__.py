"""Text to token ids and back, and the ids that end a text."""
