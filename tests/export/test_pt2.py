"""Program archives hold graphs alone; one that holds more is not opened."""

from __future__ import annotations

import pytest
import stand_in
import torch

from tvc.errors import ArtifactError
from tvc.export import base, pt2


def test_an_archive_with_weights_or_sample_inputs_is_refused(tmp_path):
    class Scale(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))

        def forward(self, x):
            return (x * self.weight,)

    exported = torch.export.export(Scale(), (torch.ones(3),))
    torch.export.save(exported, tmp_path / "scale.pt2")
    with pytest.raises(ArtifactError, match="unsafe-artifact"):
        pt2._load(tmp_path / "scale.pt2")


def test_an_unreadable_archive_is_an_artifact_error(tmp_path):
    (tmp_path / "broken.pt2").write_bytes(b"PK\x03\x04broken")
    with pytest.raises(ArtifactError, match=r"broken\.pt2"):
        pt2._load(tmp_path / "broken.pt2")


def test_taking_the_weights_out_leaves_the_program_as_it_was(program, eager, shape):
    part = program.components["decoder"]
    before = (str(part.exported.graph), sorted(part.exported.state_dict))
    stripped, weights = pt2.without_weights(part.exported)
    assert (str(part.exported.graph), sorted(part.exported.state_dict)) == before
    assert not stripped.state_dict
    assert "lm.model.embed_tokens.weight" not in weights
    inputs = stand_in.prefill(shape, 2, True)
    got = stripped.module(check_guards=False)(*weights.values(), *(inputs[name] for name in part.inputs))
    for name, value in zip(part.outputs, got, strict=True):
        torch.testing.assert_close(value, eager("decoder", inputs)[name], rtol=0, atol=1e-6)


def test_torch_and_pt2_are_one_format():
    assert type(base.target("torch")) is type(base.target("pt2")) is pt2.Pt2
