"""The scripts that train modules for the bundled model, and what they made of it."""

from __future__ import annotations

import contextlib
import io
import itertools
import pathlib
import re
import sys
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

import support
from tvc import api
from tvc.errors import ArgumentError
from tvc.evaluation import scenes
from tvc.policy import load_policy, resolve
from tvc.policy.weights import check_weights, trained
from tvc.report.budget import settings_at
from tvc.report.cost import one_image
from tvc.report.schedule import plan_policy
from tvc.runtime.prompts import prepared_batch

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
MODEL = EXAMPLES / "models" / "tiny-llava"
MODULES = {"train_scorer": "scorer", "train_exit_router": "exit-router"}
POLICIES = EXAMPLES.parent / "benchmarks" / "policies"
LEARNED = (
    "b-vllm-sampler",
    "flash-latents",
    "mqt",
    "pixel-shuffle",
    "qtsplus",
    "reread",
    "tokenflex",
)  # by train_module.py
# Settings of the bundled model's size, and budgets where the numbers of a policy are none of its own.
SMALL = {
    "b-vllm-sampler": ("keep: 25%, heads: 4, layers: 2", ""),
    "flash-latents": ("keep: 25%", ""),
    "mqt": ("heads: 4", ""),
    "pixel-shuffle": ("side: 2", "25%: {side: 2}"),
    "qtsplus": ("heads: 4, groups: 2", "25%: {least: 0.25, most: 0.25}, 11%: {least: 0.104, most: 0.104}"),
    "reread": ("keep: 25%, heads: 4, groups: 2", ""),
    "tokenflex": ("side: 6", "25%: {side: 6}, 11%: {side: 4}"),
}


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, Any]:
    model = transformers.AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)
    return model.eval().requires_grad_(False), transformers.AutoProcessor.from_pretrained(MODEL)


@pytest.mark.parametrize("name", MODULES)
def test_a_script_trains_what_its_policy_takes(
    name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / f"{MODULES[name]}.safetensors"
    monkeypatch.setattr(sys, "argv", [name, "--examples", "20", "--epochs", "1", "--output", str(made)])
    support.script(f"examples/{name}.py").main()
    policy = (EXAMPLES / "policies" / f"{MODULES[name]}.yaml").read_text()
    (tmp_path / "policy.yaml").write_text(policy)
    layout = api.layout_of(MODEL)
    for text in (tmp_path / "policy.yaml", EXAMPLES / "policies" / f"{MODULES[name]}.yaml"):
        check_weights(resolve(load_policy(text), layout).steps, layout)
    assert made.stat().st_size == (EXAMPLES / "policies" / made.name).stat().st_size < 1e6


def test_the_bundled_scorer_finds_what_questions_attend_to(bundled: tuple[Any, Any]) -> None:
    model, processor = bundled
    script = support.script("examples/train_scorer.py")
    model.set_attn_implementation("eager")
    taught = script.lessons(model, processor, "test", 3, 30)
    model.set_attn_implementation("sdpa")
    weights = safetensors.torch.load_file(script.WEIGHTS)
    scorer = script.Scorer(128, script.HIDDEN)
    scorer.load_state_dict(weights)
    share, most = script.caught(scorer, taught)
    assert share > (most + taught[2].shape[1] // 10 / taught[2].shape[1]) / 2  # nearer to the best than to chance
    ((_, primitive),) = trained(resolve(load_policy(EXAMPLES / "policies" / "scorer.yaml"), api.layout_of(MODEL)).steps)
    visual, text, _ = taught
    words = text[:, None].expand(-1, 2, -1), torch.ones(len(text), 2, dtype=torch.bool)  # the mean, and a last token
    score = primitive.apply(feature=visual, text=words, weights=primitive.tensors())  # type: ignore[attr-defined]
    torch.testing.assert_close(score, scorer(visual, text).detach(), rtol=1e-4, atol=1e-4)


def test_the_bundled_routers_seldom_let_go_too_early(bundled: tuple[Any, Any]) -> None:
    script = support.script("examples/train_exit_router.py")
    taught = script.lessons(*bundled, "test", 3, 50)
    weights = safetensors.torch.load_file(script.WEIGHTS)
    wrong = leaves = 0.0
    for layer, (states, right) in taught.items():
        router = script.Router(128, script.HIDDEN)
        router.load_state_dict({n: weights[f"language.{layer}.{n}"] for n in ("hidden.weight", "route.weight")})
        told = router(states).argmax(1) == 1
        wrong, leaves = wrong + float((told & ~right).sum()), leaves + float(told.sum())
    assert leaves > 75  # of four layers and fifty questions
    assert wrong < 0.05 * leaves


@pytest.fixture(scope="module")
def script() -> Any:
    return support.script("examples/train_module.py")


@pytest.fixture(scope="module")
def unseen(script: Any, bundled: tuple[Any, Any]) -> list[Any]:
    """Four batches of eight scenes that no training saw."""
    return list(script.lessons(*bundled, 9, 4))


@pytest.fixture(scope="module")
def lesson(unseen: list[Any]) -> Any:
    return unseen[0]


@pytest.fixture(scope="module")
def made(script: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, str]:
    """A folder of policies with the weights that two steps make for them, and what was printed."""
    folder = tmp_path_factory.mktemp("modules")
    for name, (settings, budgets) in SMALL.items():
        text = f"version: 1\nname: {name}-two\nextends: {name}\n"
        text += f"parameters: {{weights: {name}.safetensors, {settings}}}\nbudgets: {{{budgets}}}\n"
        (folder / f"{name}.yaml").write_text(text)
    files = [str(folder / f"{name}.yaml") for name in SMALL]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", ["train_module", *files, "--steps", "2", "--state", str(folder / "state")])
        script.main()
    return folder, printed.getvalue()


def at_share(policy: Any, share: str) -> Any:
    return policy.with_settings(settings_at(policy, api.layout_of(MODEL), share))


def with_weights(script: Any, policy: Any, file: pathlib.Path) -> Any:
    """The policy's step, with the weights of a file where they would be learned."""
    weights = {name: value.float() for name, value in safetensors.torch.load_file(file).items()}
    return script.learning(script.entry(policy, api.layout_of(MODEL)), weights)


def test_two_steps_make_weights_that_the_policies_take(made: tuple[pathlib.Path, str]) -> None:
    folder, printed = made
    layout = api.layout_of(MODEL)
    for name in SMALL:
        told = re.search(rf"{name}-two: step 2 at \S+: (.*); \d+ s", printed)
        assert told is not None
        losses = {term: float(value) for term, value in (one.split() for one in told[1].split(", "))}
        assert set(losses) == {"answer", "states"} | ({"score", "part"} if name == "qtsplus" else set())
        assert all(0 <= value < 20 for value in losses.values())
        check_weights(resolve(load_policy(folder / f"{name}.yaml"), layout).steps, layout)
        tensors = safetensors.torch.load_file(folder / f"{name}.safetensors").values()
        assert all(value.dtype == torch.float16 and bool(value.isfinite().all()) for value in tensors)


@pytest.mark.parametrize("name", SMALL)
def test_as_many_tokens_are_left_as_plans_count(
    name: str, script: Any, lesson: Any, made: tuple[pathlib.Path, str]
) -> None:
    for share in ("25%", "11%")[: 1 if name == "pixel-shuffle" else 2]:  # of other blocks weights have another shape
        policy = at_share(load_policy(made[0] / f"{name}.yaml"), share)
        plan = plan_policy(policy, one_image(api.layout_of(MODEL)), text_tokens=16, new_tokens=1)
        step = with_weights(script, policy, made[0] / f"{name}.safetensors")
        part = getattr(step.select, "most", 0.0)
        left = script.carried_out(step, lesson.feature, lesson.text[:8], lesson.batch.asked[:, 0], part)
        assert left.visual.shape == (8, left.chosen.shape[1], 128)
        # Where a head decides, the plan counts one more, as its share is rounded up.
        assert plan.layers[-1].visual == left.chosen.shape[1] + (name == "qtsplus")


@pytest.mark.parametrize(("name", "share"), [("mqt", "11%"), ("qtsplus", "25%")])
def test_texts_that_share_a_picture_are_read_as_alone(
    name: str, share: str, script: Any, lesson: Any, bundled: tuple[Any, Any], made: tuple[pathlib.Path, str]
) -> None:
    """Each text by itself behind the tokens that are left, through Hugging Face's decoder without a mask or a cache."""
    model, batch = bundled[0], lesson.batch
    step = with_weights(script, at_share(load_policy(made[0] / f"{name}.yaml"), share), made[0] / f"{name}.safetensors")
    rows = lesson.feature.repeat_interleave(4, 0) if step.score else lesson.feature
    with torch.no_grad():
        left = script.carried_out(step, rows, lesson.text[: len(rows)], batch.asked.flatten(0, 1)[: len(rows)], 0.25)
        made_of_all = script.said(model, batch, left.visual, left.chosen, 144, False)
        before = model.get_input_embeddings()(batch.before)
        for place, number in ((0, 0), (0, 3), (7, 2)):
            row = 4 * place + number if step.score else place
            text = lesson.text[4 * place + number][batch.real[place, number]]
            front, behind = torch.arange(len(before)), torch.arange(len(text)) + len(before) + 144
            positions = torch.cat([front, len(before) + left.chosen[row], behind])
            states = model.get_decoder()(
                inputs_embeds=torch.cat([before, left.visual[row], text])[None], position_ids=positions[None]
            ).last_hidden_state[0]
            expected = model.lm_head(states[-len(text) :])
            found = made_of_all.logits[place, number][batch.real[place, number]]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=5e-5)


@pytest.mark.conformance
@pytest.mark.parametrize(("name", "share"), [("mqt", "11%"), ("qtsplus", "25%")])
def test_what_is_trained_is_what_is_compiled(
    name: str, share: str, script: Any, lesson: Any, bundled: tuple[Any, Any], made: tuple[pathlib.Path, str]
) -> None:
    """Logits of the script's decoder, several texts behind one picture, are those of whole prompts."""
    model, processor = bundled
    policy = at_share(load_policy(made[0] / f"{name}.yaml"), share)
    step = with_weights(script, policy, made[0] / f"{name}.safetensors")
    batch = script.batch_of(processor, 9, 0, 2, 3)
    feature, text = lesson.feature[:2], model.get_input_embeddings()(batch.text.flatten(0, 1))
    rows = feature.repeat_interleave(3, 0) if step.score else feature
    with torch.no_grad():
        dense = script.said(model, batch, feature, torch.arange(144).expand(2, -1), 144, False)
        left = script.carried_out(step, rows, text[: len(rows)], batch.asked.flatten(0, 1)[: len(rows)], 0.25)
        reduced = script.said(model, batch, left.visual, left.chosen, 144, False)
        compiled = api.compile(model, policy, processor=processor, verify=False)
        for place in range(2):
            scene = scenes.scene("train", 9, place)
            for number, question in enumerate(itertools.islice(scenes.questions(scene, 9, place), 3)):
                inputs = prepared_batch(processor, [scene.image], [question.text])
                last = int(batch.asked[place, number].sum()) - 1
                for whole, found in ((model, dense), (compiled, reduced)):
                    expected = whole(**inputs).logits[0, -1]
                    torch.testing.assert_close(found.logits[place, number, last], expected, rtol=1e-4, atol=5e-5)


def test_a_killed_training_ends_with_the_weights_of_one_that_was_not(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    script: Any,
    lesson: Any,
    bundled: tuple[Any, Any],
    made: tuple[pathlib.Path, str],
) -> None:
    monkeypatch.setattr(script, "EVERY", 1)
    file = str(made[0] / "flash-latents.yaml")
    policy, save = load_policy(file), script.save

    def options(folder: str) -> Any:
        return script.parser().parse_args([file, "--steps", "3", "--state", str(tmp_path / folder)])

    def dying(*arguments: Any) -> None:
        save(*arguments)
        if arguments[3] == 2:
            raise KeyboardInterrupt

    whole = script.train(bundled[0], [lesson], policy, options("whole"))
    monkeypatch.setattr(script, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        script.train(bundled[0], [lesson], policy, options("killed"))
    monkeypatch.setattr(script, "save", save)
    again = script.train(bundled[0], [lesson], policy, options("killed"))
    assert torch.equal(whole["latents"], again["latents"])


@pytest.mark.parametrize("name", LEARNED)
def test_bundled_modules_have_learned(name: str, script: Any, unseen: list[Any], bundled: tuple[Any, Any]) -> None:
    file = EXAMPLES / "policies" / f"{name}.safetensors"
    policy = at_share(load_policy(POLICIES / f"{name}-trained.yaml"), "25%")
    step = with_weights(script, policy, file)
    torch.manual_seed(0)
    start = script.started(bundled[0], step, unseen[0].feature, script.SIZES)
    weights = safetensors.torch.load_file(file)
    assert {n: value.shape for n, value in start.items()} == {n: value.shape for n, value in weights.items()}
    with torch.no_grad():
        untrained = [script.losses_of(bundled[0], one, script.learning(step, start), 0.25) for one in unseen]
        learned = [script.losses_of(bundled[0], one, step, 0.25) for one in unseen]
    for term in ("answer", "states"):
        assert sum(one[term] for one in learned) < 0.85 * sum(one[term] for one in untrained)
    assert file.stat().st_size < 7e5


def test_policies_that_act_elsewhere_are_refused(script: Any) -> None:
    layout = api.layout_of(MODEL)
    for name in ("fastv", str(EXAMPLES / "policies" / "exit-router.yaml")):
        with pytest.raises(ArgumentError, match="cannot-train"):
            script.entry(load_policy(name), layout)
