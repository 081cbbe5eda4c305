"""Random inputs, as hypothesis draws them: batches of prompts with pictures and videos, padded, with a later turn.

What is drawn is plain data; tensors are made of it by a family's own processor, or by the stand-in for it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from hypothesis import strategies as st

import support

QUESTIONS = (
    "where is the cat?",
    "describe the picture in one sentence and name every colour that you can see.",
    "what is it?",
    "how many people can you see in the photo, and what do they wear?",
)
# Families whose processors want to know which sample a picture belongs to, also where another sample has none.
_NESTED = ("smolvlm", "gemma3")
Tensors = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Sample:
    """One prompt: the number of its question, (photo, width, height) of its pictures, and (frames, rows, columns) of
    its videos, in patches of the encoder."""

    question: int
    photos: tuple[tuple[int, int, int], ...]
    videos: tuple[tuple[int, int, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A batch; samples that differ in length are padded, on the left unless `right`.

    turn: tokens of a later turn that goes on where the call ended; 0: there is none.
    """

    samples: tuple[Sample, ...]
    right: bool = False
    turn: int = 0

    @classmethod
    def from_data(cls, data: Any) -> Inputs:
        """What `dataclasses.asdict` made, perhaps by way of JSON."""

        def of(sample: Any) -> Sample:
            parts = (tuple(tuple(part) for part in sample.get(name, ())) for name in ("photos", "videos"))
            return Sample(sample["question"], *parts)

        return cls(tuple(of(sample) for sample in data["samples"]), data.get("right", False), data.get("turn", 0))

    @property
    def images(self) -> int:
        return sum(len(sample.photos) for sample in self.samples)

    @property
    def videos(self) -> int:
        return sum(len(sample.videos) for sample in self.samples)

    def tensors(self, model: Any, family: str, processor: Any) -> Tensors:
        """What the family's processor makes of them, padded on the left."""
        record = support.family_record(family)
        conversations = [
            [
                {
                    "role": "user",
                    "content": [
                        *({"type": "image"} for _ in sample.photos),
                        {"type": "text", "text": QUESTIONS[sample.question]},
                    ],
                }
            ]
            for sample in self.samples
        ]
        template = getattr(processor, "chat_template", None) or support.template(record)
        text = support.tokenizer(family).apply_chat_template(
            conversations, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        pictures = [[support.photo(n, (wide, high)) for n, wide, high in sample.photos] for sample in self.samples]
        if processor is None:
            made = support.inputs_by_hand(family, pictures, text)
        else:
            given = {"images": pictures} if self.images else {}
            if not all(pictures) and family not in _NESTED:
                given = {"images": [picture for sample in pictures for picture in sample]} if self.images else {}
            made = processor(text=text, padding=True, return_tensors="pt", **given)
        made = {name: value for name, value in made.items() if isinstance(value, torch.Tensor) and name != "labels"}
        return self._with_videos(model, made) if self.videos else made

    def _with_videos(self, model: Any, made: Tensors) -> Tensors:
        """With each sample's videos in front of its prompt."""
        grids = [grid for sample in self.samples for grid in sample.videos]
        marked, extra = support.by_hand.video_tokens(model, grids)
        left, rows = iter(marked), []
        for sample, ids, mask in zip(self.samples, made["input_ids"], made["attention_mask"].bool(), strict=True):
            begin, *rest = ids[mask].tolist()
            rows.append([begin, *(token for _ in sample.videos for token in next(left)), *rest])
        beside = {name: value for name, value in made.items() if value.shape != made["input_ids"].shape}
        return support.by_hand.with_kinds(model, rows, {**beside, **extra})


def padded_right(tensors: Tensors) -> tuple[Tensors, torch.Tensor]:
    """The same samples with their padding behind them, and for each column [B, S] the one that it was before."""
    mask = tensors["attention_mask"]
    order = torch.argsort(mask, dim=1, descending=True, stable=True)

    def moved(value: torch.Tensor) -> torch.Tensor:
        if value.shape[:2] != mask.shape:
            return value
        return value.gather(1, order.reshape(*order.shape, *[1] * (value.dim() - 2)).expand(value.shape))

    return {name: moved(value) for name, value in tensors.items()}, order


def of_further(tensors: Tensors, tokens: int) -> Tensors:
    """What a later turn of `tokens` plain words brings beside them: their kinds [B, tokens], and what they read [B,
    tokens, ...], which is what the last token of the prompt reads."""
    slots = tensors["input_ids"].shape
    made = {}
    for name, value in tensors.items():
        if value.shape == slots and name not in ("input_ids", "attention_mask"):
            made[name] = value.new_zeros(slots[0], tokens)
        elif value.dim() > 2 and value.shape[:2] == slots:
            made[name] = value[:, -1:].expand(-1, tokens, *value.shape[2:])
    return made


@st.composite
def inputs(draw: st.DrawFn, videos: bool = False) -> Inputs:
    """One to three samples of up to two pictures each, alike or of different lengths; seldom without any picture.

    videos: whether samples may hold videos as well.
    """
    batch = draw(st.integers(1, 3))
    side = st.integers(57, 220)
    photos = st.lists(st.tuples(st.integers(0, 2), side, side), min_size=draw(st.sampled_from((0, 1, 1))), max_size=2)
    samples = st.builds(Sample, st.integers(0, len(QUESTIONS) - 1), photos.map(tuple))
    if videos and draw(st.booleans()):
        grids = st.tuples(st.integers(1, 3), st.sampled_from((2, 4, 6)), st.sampled_from((2, 4)))
        few = st.sampled_from((0, 1, 1, 2)).flatmap(lambda n: st.lists(grids, min_size=n, max_size=n))
        samples = st.builds(dataclasses.replace, samples, videos=few.map(tuple))
    more = {"right": draw(st.booleans()), "turn": draw(st.sampled_from((0, 0, 1, 3)))}
    if draw(st.booleans()):
        return Inputs((draw(samples),) * batch, **more)
    return Inputs(tuple(draw(st.lists(samples, min_size=batch, max_size=batch))), **more)
