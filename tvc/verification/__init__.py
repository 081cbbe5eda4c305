"""Compares a compiled model with the untouched one, whose dropped tokens are masked by hooks: no graph is involved."""
