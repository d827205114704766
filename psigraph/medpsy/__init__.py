"""The MedPsy pilot: its policy and guard, other runtimes beside psigraph, and the matrix of claims."""
