"""GGUF files: read strictly, written for synthetic models."""
