"""A model at every stage of compilation: computed, written to a folder, read back and shown."""
