"""Names of inputs."""

from __future__ import annotations

import pytest

from tvc.errors import InputError
from tvc.model import refuse_misspelt

NAMES = ("input_ids", "attention_mask", "pixel_values", "position_ids", "use_cache")


def test_a_misspelt_input_is_refused_with_the_name_that_was_meant() -> None:
    with pytest.raises(InputError, match="write attention_mask"):
        refuse_misspelt(("input_ids", "attention_maks"), NAMES)


def test_other_families_inputs_pass() -> None:
    refuse_misspelt(("pixel_values", "image_sizes", "image_grid_thw", "batch_num_images", "return_dict"), NAMES)
    refuse_misspelt(("mm_token_type_ids",), (*NAMES, "token_type_ids"))
