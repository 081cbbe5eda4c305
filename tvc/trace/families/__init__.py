"""Small records for model families that the generic capture cannot read."""
