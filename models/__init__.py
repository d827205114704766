"""Model blocks and policies as YAML. Data only: there is nothing to import."""
