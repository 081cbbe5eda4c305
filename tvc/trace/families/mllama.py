"""Mllama: which tiles of which images a text token reads is said beside the text, and its processor says it."""

TILES_READ = ("cross_attention_mask", "aspect_ratio_mask")
