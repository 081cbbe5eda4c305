"""How published code reduces visual tokens: the model's own layers, attention weights for the score, and a gather.

The layer before the cut runs in eager mode, because only there do its attention weights come back: a matrix of queries
x keys for every head. Its last row, averaged over heads, ranks the visual tokens. Written from that description.
"""

from __future__ import annotations

from typing import Any

import torch

from tvc.report.timing import Variant


class Published:
    """Prefill of a LLaVA with one cut, on the model's own modules."""

    def __init__(self, model: Any, case: Any, inputs: dict[str, torch.Tensor]):
        self.model, self.case, self.inputs = model, case, inputs
        self.weights: torch.Tensor | None = None
        before = model.model.language_model.layers[case.before_layer - 1]
        self._hook = before.self_attn.register_forward_hook(self._keep)

    def release(self) -> None:
        """Leaves the model as it was."""
        self._hook.remove()

    def _keep(self, _module: Any, _given: Any, result: Any) -> None:
        self.weights = result[1]

    def prefill(self) -> torch.Tensor:
        """[B, 1, vocabulary] logits of the last token."""
        decoder, ids = self.model.model.language_model, self.inputs["input_ids"]
        hidden = self.model.get_input_embeddings()(ids)
        features = torch.cat(list(self.model.model.get_image_features(self.inputs["pixel_values"]).pooler_output))
        visual = ids == self.model.config.image_token_id
        hidden = hidden.masked_scatter(visual.unsqueeze(-1), features.to(hidden.dtype))
        places = torch.arange(ids.shape[1], device=ids.device)[None]
        rotary = decoder.rotary_emb(hidden, places)
        for number, layer in enumerate(decoder.layers):
            if number == self.case.before_layer:
                hidden, places = self._cut(hidden, places, visual)
                rotary = decoder.rotary_emb(hidden, places)
            scoring = number == self.case.before_layer - 1
            decoder.config._attn_implementation = "eager" if scoring else "sdpa"
            hidden = layer(
                hidden,
                attention_mask=self._mask(hidden) if scoring else None,
                position_ids=places,
                position_embeddings=rotary,
            )
            self.weights = self.weights if scoring else None
        decoder.config._attn_implementation = "sdpa"
        logits: torch.Tensor = self.model.lm_head(decoder.norm(hidden[:, -1:]))
        return logits

    def _mask(self, hidden: torch.Tensor) -> torch.Tensor:
        length = hidden.shape[1]
        lowest = torch.finfo(hidden.dtype).min
        return torch.full((length, length), lowest, dtype=hidden.dtype, device=hidden.device).triu(1)[None, None]

    def _cut(
        self, hidden: torch.Tensor, places: torch.Tensor, visual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        first = int(visual[0].int().argmax())
        number = int(visual[0].sum())
        weights: Any = self.weights
        score = weights.mean(1)[:, -1, first : first + number]
        best = score.topk(self.case.kept).indices + first
        batch = torch.arange(hidden.shape[1], device=hidden.device).expand(len(hidden), -1)
        index = torch.cat([batch[:, :first], best, batch[:, first + number :]], 1).sort().values
        return hidden.gather(1, index.unsqueeze(2).expand(-1, -1, hidden.shape[2])), index

    def variant(self) -> Variant:
        def run(_: Any) -> torch.Tensor:
            with torch.no_grad():
                return self.prefill()

        return Variant(run)
