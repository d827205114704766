"""Device headers, included by the generated kernels. Data only: there is nothing to import."""
