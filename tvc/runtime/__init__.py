"""Running compiled models: caches, masks, generation."""
