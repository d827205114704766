"""CUDA: the driver, kernel texts to machine code, the cache of those, and cuBLASLt."""
