"""Measuring: decoding, kernels, launch shapes, passes; the report, and the machine that it speaks of."""
