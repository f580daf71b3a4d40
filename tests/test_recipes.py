"""The recipes: golden texts of all fields and decay groups, the papers' tables, two steps of each, rules of scaling.

`python tests/test_recipes.py` writes the golden texts anew.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import nn

from onefold.cli import display, main
from onefold.commands.train import Callbacks, read_recipe, resume_run, start_run
from onefold.data import Curriculum, ImageLoader, MixupLoader, Stage
from onefold.errors import BadArgument
from onefold.models import create_model
from onefold.recipes import (
    Recipe,
    all_recipes,
    find_recipe,
    make_recipe,
    override,
    scale_to_batch_size,
    with_epochs,
    with_image_size,
)
from onefold.train import SGD, AdamW, Checkpoint, Cosine, Ema, Epochs, RMSprop, Steps, decay_groups

GOLDEN = Path(__file__).parent / "golden" / "recipes"
ALL = pytest.mark.parametrize("recipe", all_recipes(), ids=lambda recipe: recipe.name)


def golden_path(recipe: Recipe) -> Path:
    return GOLDEN / f"{recipe.name.replace(':', '-')}.txt"


def golden_text(recipe: Recipe) -> str:
    """Every field, then for each decay group its parameters: numbers in names as *, how many tensors and values."""
    lines = [f"{path} {value}" for path, value in display._fields(recipe.to_dict())]
    model = create_model(recipe.model)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    for group, names in decay_groups(model, recipe.plan.weight_decay.skip).items():
        lines.append(f"\n{group}: {len(names)} tensors, {sum(sizes[name] for name in names)} values")
        patterns = [re.sub(r"\.\d+", ".*", name) for name in names]
        values: Counter[str] = Counter()
        for name, pattern in zip(names, patterns, strict=True):
            values[pattern] += sizes[name]
        lines += [
            f"  {pattern} {count} tensors, {values[pattern]} values" for pattern, count in Counter(patterns).items()
        ]
    return "\n".join(lines) + "\n"


@ALL
def test_a_recipe_is_what_its_golden_text_says(recipe: Recipe) -> None:
    assert golden_text(recipe) == golden_path(recipe).read_text(), "if wanted: python tests/test_recipes.py"


def test_no_golden_text_is_left_over() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == {golden_path(recipe).name for recipe in all_recipes()}


# ------------------------------------------------------------------------------- the papers' tables


def test_mobileone_as_the_paper_states() -> None:
    for variant, top1 in {"s0": 71.4, "s1": 75.9, "s2": 77.4, "s3": 78.1, "s4": 79.4}.items():
        recipe = find_recipe(f"mobileone:{variant}")
        plan = recipe.plan
        assert (recipe.model, recipe.expect and recipe.expect.top1) == (f"mobileone_{variant}", top1)
        assert (plan.epochs, plan.batch_size, plan.label_smoothing) == (300, 256, 0.1)
        assert plan.optimizer == SGD(lr=0.1, momentum=0.9)
        assert plan.ema == Ema(decay=0.9995)
        assert (plan.weight_decay.start, plan.weight_decay.final) == (1e-4, 1e-5)
        names = [type(step).__name__ for step in recipe.steps]
        grows = variant in ("s2", "s3", "s4")
        assert names == ["RandomResizedCrop", "HorizontalFlip"] + ["AutoAugment"] * grows
        assert (recipe.curriculum is not None) == grows


def test_mobileformer_as_the_published_commands_state() -> None:
    # size: lr, decay, dropout, mixup, RandAugment's magnitude, erasing, top-1
    table = {
        "508m": (1e-3, 0.20, 0.3, 0.2, 9, 0.2, 79.3),
        "294m": (1e-3, 0.20, 0.3, 0.2, 9, 0.2, 77.9),
        "214m": (9e-4, 0.15, 0.2, 0.2, 9, 0.2, 76.7),
        "151m": (9e-4, 0.10, 0.2, 0.2, 9, 0.2, 75.2),
        "96m": (8e-4, 0.10, 0.2, 0.0, 9, 0.0, 72.8),
        "52m": (8e-4, 0.10, 0.2, 0.2, 0, 0.0, 68.7),
        "26m": (8e-4, 0.08, 0.1, 0.2, 9, 0.0, 64.0),
    }
    for size, row in table.items():
        plain = find_recipe(f"mobileformer:{size}").to_dict()
        plan = plain["plan"]
        assert (plan["optimizer"]["kind"], plan["epochs"], plan["batch_size"]) == ("AdamW", 450, 1024)
        magnitudes = [step["magnitude"] for step in plain["steps"] if step["kind"] == "RandAugment"]
        told = (plan["optimizer"]["lr"], plan["weight_decay"]["start"], plain["dropout"])
        told += ((plain["mixing"] or {"mixup": 0.0})["mixup"], *(magnitudes or [0]))
        told += ((plain["erase"] or {"p": 0.0})["p"], plain["expect"]["top1"])
        assert told == row


def test_mobilenetv1_at_all_sixteen_widths_and_sizes() -> None:
    table = {  # the paper's where it prints one, else TF-slim's
        "w100": (70.6, 69.1, 67.2, 64.4),
        "w075": (68.4, 67.2, 65.3, 62.1),
        "w050": (63.7, 61.7, 59.1, 56.3),
        "w025": (50.6, 47.7, 45.5, 41.5),
    }
    for width, row in table.items():
        sized = [find_recipe(f"mobilenetv1:{width}", size) for size in (224, 192, 160, 128)]
        assert tuple(r.expect.top1 for r in sized if r.expect) == row
        assert [(r.preprocessing.size, r.steps[0].size) for r in sized] == [(s, s) for s in (224, 192, 160, 128)]
        assert {type(r.plan.optimizer) for r in sized} == {RMSprop}
    assert find_recipe("mobilenetv1:w100", 96).expect is None
    assert find_recipe("mobilenetv1:w100") == find_recipe("mobilenetv1:w100", 224)


@pytest.mark.parametrize("recipe", [r for r in all_recipes() if r.name.startswith("mobilenetv1")], ids=lambda r: r.name)
def test_no_depthwise_kernel_of_a_mobilenet_decays(recipe: Recipe) -> None:
    model = create_model(recipe.model)
    groups = decay_groups(model, recipe.plan.weight_decay.skip)
    modules = dict(model.named_modules())
    kernels = [name for name, m in modules.items() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1]
    assert len(kernels) == 13
    assert {f"{name}.weight" for name in kernels} <= set(groups["skip"])
    dense = [f"{n}.weight" for n, m in modules.items() if isinstance(m, nn.Conv2d | nn.Linear) and n not in kernels]
    assert set(dense) == set(groups["decay"])


# ------------------------------------------------------------------------------------- two steps


def photos(folder: Path, side: int = 40) -> Path:
    """Four classes of four noisy pictures for training, and one each for validation."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 1)):
        for label in range(4):
            place = folder / split / f"c{label}"
            place.mkdir(parents=True)
            for i in range(count):
                noise = rng.integers(0, 256, (side, side, 3), np.uint8)
                Image.fromarray(noise // 2 + np.uint8(30 * label)).save(place / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos(tmp_path_factory.mktemp("photos"))


OWN_NETWORK = ("mobileone:s1", "mobileformer:26m", "mobilenetv1:w025")  # the others train the quickest one


@ALL
def test_a_recipe_shrunk_to_two_steps_trains(recipe: Recipe, data: Path, tmp_path: Path) -> None:
    """Every field as it is, but for size, length and network; two steps, and for one curriculum two in each stage."""
    epochs = len(recipe.curriculum.stages) if recipe.curriculum and recipe.name == "mobileone:s2" else 1
    shrunk = with_epochs(with_image_size(recipe, 32), epochs)
    changes = {"data.spec": str(data), "plan.batch_size": "8", "plan.workers": "0"}
    changes["model"] = recipe.model if recipe.name in OWN_NETWORK else "mobilenetv1_025"
    changes["head"] = "kept"  # a probe needs weights
    if recipe.plan.distill:
        changes["plan.distill"] = "none"
    done = start_run(override(shrunk, changes), tmp_path / "run")
    assert math.isfinite(done.top1)
    saved = Checkpoint.load(tmp_path / "run")
    assert saved.position.global_step == 2 * epochs
    assert read_recipe(tmp_path / "run").plan == saved.plan


def test_dropout_of_a_recipe_reaches_the_network(data: Path, tmp_path: Path) -> None:
    """With everything dropped only the last bias can learn: the pooled features are always 0."""
    recipe = with_epochs(find_recipe("mobileformer:26m", 32), 1)
    changes = {"data.spec": str(data), "plan.batch_size": "8", "plan.workers": "0"}
    start_run(override(recipe, {**changes, "dropout": "1.0"}), tmp_path / "run")
    saved = Checkpoint.load(tmp_path / "run")
    assert float(saved.optimizer["head.fc.weight/exp_avg"].abs().max()) == 0.0
    assert float(saved.optimizer["head.fc.bias/exp_avg"].abs().max()) > 0.0


def test_a_mixed_and_grown_run_resumes_to_the_bit(data: Path, tmp_path: Path) -> None:
    """Mixup, CutMix, RandAugment, erasing, a curriculum and dropout: stopped in the middle, the same weights."""
    recipe = with_epochs(find_recipe("mobileformer:508m", 32), 2)
    recipe = replace(
        recipe, curriculum=Curriculum(stages=(Stage(epoch=0, size=24, strength=0.5), Stage(epoch=1, size=32)))
    )
    changes = {"model": "mobilenetv1_025", "data.spec": str(data), "plan.batch_size": "8", "mixing.cutmix": "1.0"}
    recipe = override(recipe, {**changes, "plan.workers": "0", "plan.checkpoint_every": "1 steps"})
    whole = start_run(recipe, tmp_path / "whole")
    assert whole.epoch in (1, 2)

    class Enough(Exception):
        pass

    def stop(progress: object) -> None:
        if (progress.epoch, progress.step) == (2, 2):  # type: ignore[attr-defined]
            raise Enough

    with pytest.raises(Enough):
        start_run(recipe, tmp_path / "cut", callbacks=Callbacks(on_progress=stop))
    resume_run(tmp_path / "cut")
    assert Checkpoint.load(tmp_path / "cut").digest() == Checkpoint.load(tmp_path / "whole").digest()


# --------------------------------------------------------------------------- other sizes and lengths


def test_another_length_keeps_the_shares_of_warm_up_and_curriculum() -> None:
    recipe = with_epochs(find_recipe("mobileone:s3"), 100)
    assert isinstance(recipe.plan.schedule, Cosine)
    assert recipe.plan.schedule.warmup == Epochs(5 / 3)
    assert recipe.curriculum is not None
    assert [stage.epoch for stage in recipe.curriculum.stages] == [0, 12, 37]
    assert recipe.expect is None
    assert with_epochs(recipe, 100) is recipe
    one = with_epochs(recipe, 1).curriculum
    assert one is not None
    assert one.stages == (Stage(epoch=0, size=224),)  # of stages that would share an epoch the last stays


def test_another_size_is_that_of_all_steps_and_stages() -> None:
    recipe = with_image_size(find_recipe("mobileone:s4"), 96)
    assert recipe.curriculum is not None
    assert [stage.size for stage in recipe.curriculum.stages] == [72, 80, 96]
    assert (recipe.preprocessing.size, recipe.steps[0].size, recipe.expect) == (96, 96, None)
    assert with_image_size(recipe, 96) is recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plan.epochs": "100"}, "last stage begins at epoch 112, but plan.epochs is 100: epochs=100 shortens both"),
        ({"preprocessing.size": "128"}, "ends at 224 px, but preprocessing.size is 128: img_size="),
        ({"curriculum.stages.1.epoch": "0"}, r"the stages begin at epochs \[0, 0, 112\], expected 0 first"),
        ({"curriculum.stages.1.strength": "1.5"}, "strength 1.5: expected .* a share from 0 to 1"),
        ({"steps.2.strength": "2"}, "strength is 2, expected a share from 0 to 1"),
        ({"steps.2.policy": "cifar"}, "policy is 'cifar', expected 'imagenet'"),
        ({"mixing": '{"kind": "Mixing"}'}, "mixup is 0.0 and cutmix 0.0, expected one above 0"),
        ({"erase": '{"kind": "RandomErasing", "p": 2}'}, "p is 2, expected a probability from 0 to 1"),
        ({"dropout": "1.5"}, r"recipe\.dropout must be a number from 0 to 1 or none, not 1\.5"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, str], message: str) -> None:
    with pytest.raises(BadArgument, match=message):
        override(find_recipe("mobileone:s2"), changes)


# ------------------------------------------------------------------------------------------ scaling


def test_scaling_sgd() -> None:
    recipe = find_recipe("mobileone:s0")
    bigger = scale_to_batch_size(recipe, batch_size=32, devices=64)
    plan = bigger.plan
    assert (plan.batch_size, plan.optimizer.lr) == (2048, 0.1 * 8)
    assert plan.ema is not None
    assert plan.ema.decay == 0.9995**8
    assert plan.schedule == recipe.plan.schedule  # five epochs of warm-up, from 0 to 0
    assert plan.weight_decay == recipe.plan.weight_decay
    assert bigger.notes == (
        "scaled from 256 to 2048 images a step: lr x 8, linear (arXiv 1706.02677); EMA decay ^ 8 (arXiv 2307.13813)",
    )
    assert bigger.expect == recipe.expect
    assert Recipe.from_dict(json.loads(json.dumps(bigger.to_dict()))) == bigger


def test_scaling_adamw_and_rmsprop() -> None:
    former = scale_to_batch_size(find_recipe("mobileformer:294m"), batch_size=4096).plan
    assert former.optimizer == AdamW(lr=1e-3 * 2)
    assert former.schedule == Cosine(final=2e-5, warmup=Epochs(3), warmup_from=2e-4)
    assert scale_to_batch_size(find_recipe("mobilenetv1:w100"), batch_size=64).plan.optimizer.lr == 0.045 / 2


def test_scaling_there_and_back_changes_nothing_but_the_notes() -> None:
    recipe = find_recipe("mobileone:s0")
    recipe = replace(recipe, plan=replace(recipe.plan, schedule=Cosine(warmup=Steps(640))))
    there = scale_to_batch_size(recipe, batch_size=512)
    assert there.plan.schedule == Cosine(warmup=Steps(320))
    back = scale_to_batch_size(there, batch_size=256)
    assert len(back.notes) == 2
    assert back.plan.ema is not None
    assert back.plan.ema.decay == pytest.approx(0.9995, rel=1e-15)
    assert replace(back.plan, ema=recipe.plan.ema) == recipe.plan
    assert scale_to_batch_size(recipe, batch_size=256) is recipe


def test_scaling_from_the_command_line() -> None:
    wanted = make_recipe("mobileone:s2", {"plan.seed": "3"}, size=160, epochs=30, scale_to_batch=1024)
    assert (wanted.plan.batch_size, wanted.plan.optimizer.lr, wanted.plan.seed) == (1024, 0.4, 3)
    with pytest.raises(BadArgument, match="give one"):
        make_recipe("mobileone:s2", {"plan.batch_size": "8"}, scale_to_batch=1024)
    with pytest.raises(BadArgument, match="expected 1 or more"):
        make_recipe("mobileone:s2", {}, scale_to_batch=0)


def test_a_complete_recipe_is_shown_with_what_was_changed(capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["--img-size", "160", "--epochs", "30", "--scale-to-batch", "512", "--curriculum", "none"]
    changes += ["--mixing", '{"cutmix": 1.0}', "--erase.p=0.25", "--plan.seed", "5"]
    assert main(["train", "--show", "--recipe", "mobileformer:294m", *changes]) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    wanted = {
        "mixing.cutmix": "1.0",
        "erase.p": "0.25",
        "plan.seed": "5",
        "plan.batch_size": "512",
        "curriculum": "null",
    }
    wanted |= {"plan.optimizer.lr": str(1e-3 * math.sqrt(0.5)), "steps.0.size": "160", "plan.epochs": "30"}
    assert {field: shown[field] for field in wanted} == wanted
    assert main(["train", "--show", "--recipe", "mobileone:s2", "--mixin", "none"]) == 2
    assert "train has no option --mixin" in capsys.readouterr().err


def test_a_recipe_makes_the_batches_it_says(data: Path) -> None:
    from onefold.commands.train import _batches
    from onefold.data import open_dataset
    from onefold.train import World

    recipe = override(find_recipe("mobileformer:508m", 32), {"plan.batch_size": "8", "plan.workers": "0"})
    mixed = _batches(open_dataset(str(data), "train", seed=0, val_fraction=0.2), recipe, World())
    assert isinstance(mixed, MixupLoader)
    assert isinstance(mixed.batches, ImageLoader)
    images, shares = next(iter(mixed.epoch(0)))
    assert images.shape == (8, 3, 32, 32)
    assert shares.shape == (8, 4)


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for each in all_recipes():
        golden_path(each).write_text(golden_text(each))
