"""tvc: a compiler that reduces the visual tokens of a vision-language model."""
