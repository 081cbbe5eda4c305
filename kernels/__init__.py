"""Ops and policy primitives, one file each."""
