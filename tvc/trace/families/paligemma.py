"""PaliGemma: a prompt, image and text alike, is a prefix that sees itself both ways; the answer is the suffix."""

TOKEN_TYPES = "prefix"
