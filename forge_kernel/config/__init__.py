"""Configuration: strict YAML, JSON Schemas, layers; imports no torch."""
