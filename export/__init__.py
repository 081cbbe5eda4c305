"""Artifacts for stock runtimes, one file a target."""
