"""The policy language: schema, loading, presets."""
