"""Photos and questions as a processor's tensors, in the chat form that the model was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def prepared(processor: Any, photo: Any, prompt: str) -> dict[str, Any]:
    """The processor's tensors for one photo and one question."""
    text = chat(processor, prompt)
    return dict(processor(images=[photo], text=[text], return_tensors="pt", **special_tokens(processor, text)))


def prepared_batch(processor: Any, photos: Sequence[Any], prompts: Sequence[str]) -> dict[str, Any]:
    """The processor's tensors for several samples of one photo and one question each, padded on the left."""
    texts = [chat(processor, prompt) for prompt in prompts]
    # Nested: processors that take several images a sample tell by it which image is whose.
    images = [[photo] for photo in photos]
    options = {"padding": True, "padding_side": "left", "return_tensors": "pt", **special_tokens(processor, texts[0])}
    return dict(processor(images=images, text=texts, **options))


def special_tokens(processor: Any, text: str) -> dict[str, bool]:
    """Options that keep a tokenizer from writing a second first token where the chat template wrote one."""
    first = processor.tokenizer.bos_token
    return {"add_special_tokens": False} if first is not None and text.startswith(first) else {}


def chat(processor: Any, prompt: str) -> str:
    """One user turn of an image and a text, up to where the answer begins."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text: str = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return text
    return f"{processor.image_token} {prompt}"
