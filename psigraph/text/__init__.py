"""Text in and out: prompts, templates, samplers, generation, conversations, and judging a model by a text."""
