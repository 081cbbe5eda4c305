"""Policies: what to reduce, where and by how much, as data."""

from tvc.policy.json_schema import json_schema
from tvc.policy.load import load_policy, presets
from tvc.policy.resolve import ResolvedPolicy, resolve
from tvc.policy.schema import Exit, Policy, SiteName, Step, WeightedScore, parse_site

__all__ = [
    "Exit",
    "Policy",
    "ResolvedPolicy",
    "SiteName",
    "Step",
    "WeightedScore",
    "json_schema",
    "load_policy",
    "parse_site",
    "presets",
    "resolve",
]
