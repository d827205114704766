"""Emitters: a node -> its kernel's text and launch."""
