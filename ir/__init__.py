"""The IR: grammar, types, op table, printer and parser, verifier, YAML loader, interpreter, Program."""
