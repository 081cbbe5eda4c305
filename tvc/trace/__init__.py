"""From a Hugging Face model to a program of traced components."""
