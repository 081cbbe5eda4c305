"""Weights that a policy names: where their file is, and what is refused of it, by name."""

from __future__ import annotations

import pathlib
import pickle
from typing import Any

import pytest
import safetensors.torch
import torch
from policy_cases import layout, policy, step

from tvc.errors import PolicyError, WeightsError
from tvc.kernels.weights import Trained
from tvc.policy import Policy, load_policy, resolve
from tvc.policy.weights import check_weights, trained

WIDTH = 32  # of the decoder in `layout`
SCORER = "score: {{mlp: {{weights: '{}', text: mean{}}}}}\n    select: {{top: 50%}}"
ROUTER = "exit: {{when: {{router: {{weights: '{}'{}}}}}}}"


def scorer(width: int = WIDTH, hidden: int = 6) -> dict[str, torch.Tensor]:
    return {
        "visual.weight": torch.ones(hidden, width),
        "text.weight": torch.ones(hidden, width),
        "hidden.bias": torch.ones(hidden),
        "score.weight": torch.ones(1, hidden),
        "score.bias": torch.ones(1),
    }


def routers(*layers: int) -> dict[str, torch.Tensor]:
    found = {}
    for layer in layers:
        hidden = 3 + layer  # each router has a width of its own
        found[f"language.{layer}.hidden.weight"] = torch.ones(hidden, 2 * WIDTH)
        found[f"language.{layer}.route.weight"] = torch.full((2, hidden), float(layer))
    return found


def using(template: str, file: object, more: str = "") -> str:
    return template.format(file, more)


def check(loaded: Policy) -> list[Trained]:
    resolved = resolve(loaded, layout())
    check_weights(resolved.steps, layout())
    return [primitive for _, primitive in trained(resolved.steps)]


def refused(tmp_path: pathlib.Path, tensors: Any, text: str = SCORER, at: str = "language.0") -> WeightsError:
    file = tmp_path / "w.safetensors"
    file.write_bytes(tensors) if isinstance(tensors, bytes) else safetensors.torch.save_file(tensors, file)
    loaded = load_policy(policy(step(at, using(text, file))))
    with pytest.raises(WeightsError) as caught:
        _ = [primitive.tensors() for primitive in check(loaded)]
    assert caught.value.exit_code == 2
    assert str(file) in caught.value.where
    return caught.value


def test_weights_that_fit_are_taken(tmp_path: pathlib.Path) -> None:
    safetensors.torch.save_file(scorer(), tmp_path / "w.safetensors")
    (only,) = check(load_policy(policy(step("language.0", using(SCORER, tmp_path / "w.safetensors")))))
    assert {name: tuple(tensor.shape) for name, tensor in only.tensors().items()} == {
        "visual.weight": (6, 32),
        "text.weight": (6, 32),
        "hidden.bias": (6,),
        "score.weight": (1, 6),
        "score.bias": (1,),
    }


def test_a_tensor_that_is_missing_is_named(tmp_path: pathlib.Path) -> None:
    tensors = scorer()
    del tensors["text.weight"], tensors["score.bias"]
    error = refused(tmp_path, tensors)
    assert error.slug == "missing-weight"
    assert error.got.startswith("no text.weight, score.bias; there are ")
    assert "text.weight [hidden, 32]" in error.want


def test_a_tensor_that_nothing_takes_is_named(tmp_path: pathlib.Path) -> None:
    error = refused(tmp_path, {**scorer(), "score.extra": torch.ones(1), "other": torch.ones(1)})
    assert error.slug == "extra-weight"
    assert error.got == "other, score.extra"


@pytest.mark.parametrize(
    ("name", "tensor", "want"),
    [
        ("visual.weight", torch.ones(6, 31), "visual.weight [hidden, 32]"),
        ("visual.weight", torch.ones(6, 32, 1), "visual.weight [hidden, 32]"),
        ("score.weight", torch.ones(2, 6), "score.weight [1, hidden]"),
        ("score.weight", torch.ones(1, 7), "score.weight [1, hidden] with hidden = 6 by visual.weight"),
        (
            "hidden.bias",
            torch.ones(6, dtype=torch.int64),
            "hidden.bias [hidden] with hidden = 6 by visual.weight, one of",
        ),
        ("score.bias", torch.ones(1, dtype=torch.bool), "score.bias [1], one of F64, F32, F16, BF16"),
    ],
)
def test_a_tensor_of_another_shape_or_type_is_named(
    tmp_path: pathlib.Path, name: str, tensor: torch.Tensor, want: str
) -> None:
    error = refused(tmp_path, {**scorer(), name: tensor})
    assert error.slug == "weight-shape"
    assert error.got.startswith(f"{name} [{', '.join(map(str, tensor.shape))}] ")
    assert error.want.startswith(want)


def test_numbers_that_are_not_finite_are_named(tmp_path: pathlib.Path) -> None:
    tensors = scorer()
    tensors["hidden.bias"][2] = float("nan")
    error = refused(tmp_path, tensors)
    assert (error.slug, error.got) == ("weights-not-finite", "hidden.bias: 1 of 6 numbers")


def test_a_pickle_in_disguise_is_not_opened(tmp_path: pathlib.Path) -> None:
    assert refused(tmp_path, pickle.dumps({"visual.weight": 1})).slug == "not-safetensors"
    assert refused(tmp_path, b"").slug == "not-safetensors"


def test_a_file_of_another_kind_is_refused_by_its_name() -> None:
    for name in ("scorer.pt", "scorer.pth", "scorer.bin", "scorer"):
        with pytest.raises(PolicyError, match="bad-weights") as caught:
            load_policy(policy(step("language.0", using(SCORER, name))))
        assert caught.value.where == "policy text:4, steps[0].score.mlp.weights"


def test_a_file_that_is_not_there_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(WeightsError, match="missing-weights") as caught:
        check(load_policy(policy(step("language.0", using(SCORER, tmp_path / "none.safetensors")))))
    assert caught.value.where == str(tmp_path / "none.safetensors")


# Where the file is ----------------------------------------------------------------------------------------------------


def test_a_path_starts_beside_the_file_that_writes_it(tmp_path: pathlib.Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    head = "version: 1\nparameters: {weights: %s}"
    base = policy(step("language.0", using(SCORER, "{weights}")), head=head % "base.safetensors")
    (inner / "base.yaml").write_text(base)
    (tmp_path / "child.yaml").write_text("version: 1\nextends: inner/base.yaml\n")
    (tmp_path / "own.yaml").write_text("version: 1\nextends: inner/base.yaml\nparameters: {weights: own.safetensors}\n")

    def path(name: str, *settings: str) -> pathlib.Path:
        (only,) = load_policy(tmp_path / name, set=settings).steps[0].primitives()[:1]
        return only.weights.path  # type: ignore[attr-defined, no-any-return]

    assert path("child.yaml") == inner / "base.safetensors"
    assert path("own.yaml") == tmp_path / "own.safetensors"
    assert path("child.yaml", "weights=here.safetensors") == pathlib.Path("here.safetensors")
    (only,) = trained(resolve(load_policy(tmp_path / "child.yaml"), layout()).steps)
    assert only[1].weights.path == inner / "base.safetensors"


def test_a_policy_is_read_and_resolved_without_its_weights(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.yaml").write_text(policy(step("language.2..-1", using(ROUTER, "none.safetensors"))))
    resolved = resolve(load_policy(tmp_path / "a.yaml"), layout())
    assert [s.at for s in resolved.steps] == [f"language.{n}" for n in range(2, 12)]
    again = load_policy(resolved.to_yaml())
    assert again == resolved.policy
    assert resolve(again, layout()).policy == resolved.policy


def test_the_digest_is_of_the_weights_not_of_their_place(tmp_path: pathlib.Path) -> None:
    digests = []
    for place, value in (("one", 1.0), ("other", 1.0), ("third", 2.0)):
        folder = tmp_path / place
        folder.mkdir()
        safetensors.torch.save_file({"x": torch.tensor(value)}, folder / "w.safetensors")
        (folder / "a.yaml").write_text(policy(step("language.0", using(SCORER, "w.safetensors"))))
        digests.append(load_policy(folder / "a.yaml").digest())
    assert digests[0] == digests[1] != digests[2]


# Several sites --------------------------------------------------------------------------------------------------------


def test_at_a_range_each_site_has_names_of_its_own(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "w.safetensors"
    safetensors.torch.save_file(routers(2, 3, 4), file)
    found = check(load_policy(policy(step("language.2..4", using(ROUTER, file)))))
    assert [float(one.tensors()["route.weight"][0, 0]) for one in found] == [2.0, 3.0, 4.0]
    assert [one.prefix for one in found] == ["language.2", "language.3", "language.4"]


def test_routers_of_too_many_or_too_few_layers_are_named(tmp_path: pathlib.Path) -> None:
    error = refused(tmp_path, routers(2, 3, 4, 5), ROUTER, "language.2..4")
    assert (error.slug, error.got) == ("extra-weight", "language.5.hidden.weight, language.5.route.weight")
    error = refused(tmp_path, routers(2, 3), ROUTER, "language.2..4")
    assert error.slug == "missing-weight"
    assert error.got.startswith("no language.4.hidden.weight, language.4.route.weight; there are language.2.hidden")


def test_one_file_may_serve_several_steps(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "w.safetensors"
    tensors = {f"entry.{name}": tensor for name, tensor in scorer().items()}
    safetensors.torch.save_file({**tensors, **routers(3)}, file)
    entry, late = using(SCORER, file, ", prefix: entry"), using(ROUTER, file, ", prefix: language.3")
    found = check(load_policy(policy(step("language.0", entry), step("language.3", late))))
    assert [one.prefix for one in found] == ["entry", "language.3"]
