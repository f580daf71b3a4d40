"""Measured routes: which are taken by the times, that any of them is the same function, and that they are kept."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from onefold import accelerate
from onefold.checksums import read_sealed_json, write_sealed_folder
from onefold.commands import training_routes
from onefold.commands.saved_recipe import routes_of_run
from onefold.commands.training_routes import choose_routes_
from onefold.models import create_model
from onefold.recipes import Recipe, make_recipe
from onefold.reparam import Chain, Sum, measured_routes, per_branch, quickest, set_route_
from onefold.reparam.measured_routes import ROUTES, fastest, measure_routes, set_routes_
from onefold.train.checkpoint import PROGRESS_FILE
from test_accelerate import Plain, within_rounding
from test_routes import batch, gap, unit

CPU = torch.device("cpu")


def timers(**seconds: float | list[float]) -> tuple[dict[str, Callable[[], float]], dict[str, int]]:
    """Calls that take so many seconds, one after another, and how often each was called."""
    called = dict.fromkeys(seconds, 0)

    def call(name: str) -> Callable[[], float]:
        times = seconds[name]

        def one() -> float:
            called[name] += 1
            return times if isinstance(times, float) else times[min(called[name] - 1, len(times) - 1)]

        return one

    return {name: call(name) for name in seconds}, called


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"per_branch": 1.0, "moments": 0.98, "mixed": 1.2}, "per_branch"),  # faster, by less than the noise
        ({"per_branch": 1.0, "moments": 0.9, "mixed": 0.95}, "moments"),
        ({"per_branch": 1.0, "mixed": 0.6}, "mixed"),
        ({"per_branch": 1.0, "moments": 1.4, "mixed": 1.6}, "per_branch"),
        ({"per_branch": 1.0, "moments": 9.0}, "per_branch"),
        ({"per_branch": 9.0, "moments": 1.0, "mixed": 0.99}, "mixed"),  # of two routes the faster, by whatever
        # one round in which all were slow, and one in which a neighbour disturbed one of them
        ({"per_branch": [0.0, 1.0, 5.0, 1.0, 1.0, 1.0], "moments": [0.0, 0.8, 4.0, 3.0, 0.8, 0.8]}, "moments"),
    ],
)
def test_a_route_is_taken_where_it_is_faster_than_plain_torch(seconds, expected):
    assert fastest(timers(**seconds)[0]) == expected


def test_what_is_far_behind_is_called_twice_and_no_more():
    calls, called = timers(per_branch=9.0, moments=1.0, mixed=1.1)
    fastest(calls)
    assert called == {"per_branch": 2, "moments": 6, "mixed": 6}
    calls, called = timers(per_branch=1.0, moments=2.0)
    fastest(calls)
    assert called == {"per_branch": 2, "moments": 2}


class Net(nn.Module):
    """Units of one shape and of another, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.same, self.more = (unit(8, 8, 3, 1, 8, 2) for _ in range(3))
        self.wide = unit(8, 16, 1, 1, 1, 1)
        self.act = nn.ReLU()
        set_route_(self, quickest)

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.one, self.same, self.more, self.wide):
            x = part(x, self.act)
        return x.mean((2, 3))


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What would be timed, by the names of routes; the last of them is the answer."""
    asked: list[tuple[str, ...]] = []

    def last(calls: dict[str, Callable[[], float]], limit_s: float = 0.0) -> str:
        assert all(call() > 0 for call in calls.values())
        if "as its parts" in calls:  # the whole network, in the end
            return "as its parts"
        asked.append(tuple(calls))
        return list(calls)[-1]

    monkeypatch.setattr(measured_routes, "fastest", last)
    monkeypatch.setattr(measured_routes, "SMALLEST_MAPS", 0)
    monkeypatch.setattr(measured_routes, "UNLIKELY", float("inf"))
    return asked


def test_each_kind_of_part_is_timed_once(timed, seeded):
    known: dict[str, str] = {}
    images, model = torch.zeros(4, 8, 12, 12), Net()
    choices = measure_routes(copy.deepcopy(model), images, known)
    assert list(choices) == ["one", "same", "more", "wide"]
    assert set(choices.values()) == {names[-1] for names in timed}
    assert len(timed) == len(known) - 1 == 3  # the first is of a kind of its own: its input needs no gradient
    assert measure_routes(copy.deepcopy(model), images, known) == choices
    assert len(timed) == 3
    measure_routes(copy.deepcopy(model), images[:2], known)  # of another batch
    with torch.autocast("cpu", torch.bfloat16):
        measure_routes(copy.deepcopy(model), images, known)
    assert len(timed) == 9, "of each of the three kinds"


def test_a_network_that_gains_nothing_as_a_whole_stays_plain_torch(timed, seeded, monkeypatch):
    answers = {"as its parts": "per_branch"}  # each part gains, and all together do not
    monkeypatch.setattr(measured_routes, "fastest", lambda calls, *_: answers.get(next(iter(calls)), list(calls)[-1]))
    known: dict[str, str] = {}
    choices = measure_routes(Net(), torch.zeros(4, 8, 12, 12), known)
    assert set(choices.values()) == {"per_branch"}
    assert measure_routes(Net(), torch.zeros(4, 8, 12, 12), known) == choices


def test_what_does_not_train_or_is_small_is_not_timed(timed, seeded, monkeypatch):
    model, images = Net(), torch.zeros(4, 8, 12, 12)
    model.one.eval()
    model.same.requires_grad_(False).eval()
    model.more.route = per_branch  # as one that somebody has named
    assert list(measure_routes(copy.deepcopy(model), images, {})) == ["wide"]
    monkeypatch.setattr(measured_routes, "SMALLEST_MAPS", 1 << 15)
    assert measure_routes(copy.deepcopy(model), images, {}) == {}


def test_when_the_time_is_up_the_count_decides(timed, seeded):
    choices = measure_routes(Net(), torch.zeros(4, 8, 12, 12), {}, limit_s=-1)
    assert set(choices.values()) == {"quickest"}
    assert not timed


def test_a_strided_pointwise_layer_that_torch_may_crash_in_is_never_left_to_it(timed, seeded):
    model = nn.Sequential(unit(3, 8, 3, 2, 1, 1))
    set_route_(model, quickest)
    assert measure_routes(model, torch.zeros(4, 3, 12, 12), {}) == {}


@pytest.mark.parametrize("choice", ROUTES)
def test_every_route_is_the_same_function(choice, seeded):
    model = nn.Sequential(unit(6, 6, 3, 1, 6, 2), unit(6, 8, 1, 1, 1, 1)).double()
    other = copy.deepcopy(model)
    assert set_routes_(other, {"0": choice, "1": choice, "2": "moments"}) == ["2"]
    x = batch(4, 6, 7, 7)
    for each in (model, other):
        each(x).square().sum().backward()
    assert gap(model(x), other(x)) <= 1e-10
    assert max(gap(p.grad, q.grad) for p, q in zip(model.parameters(), other.parameters(), strict=True)) <= 1e-10
    assert max(gap(p, q) for p, q in zip(model.buffers(), other.buffers(), strict=True)) <= 1e-10
    with torch.no_grad():
        assert torch.equal(set_route_(copy.deepcopy(other), per_branch).eval()(x), other.eval()(x))


@pytest.mark.parametrize("choice", ["per_branch", "quickest"])
def test_blocks_of_other_projects_are_taken_or_given_back(choice, timed, seeded, monkeypatch):
    monkeypatch.setattr(measured_routes, "fastest", lambda calls, *_: choice if choice in calls else "as its parts")
    model = nn.Sequential(Plain(), Plain()).train()
    faster = accelerate(copy.deepcopy(model), torch.zeros(4, 8, 12, 12))
    told = faster.acceleration
    assert set(told.routes.values()) == {choice}
    if choice == "per_branch":
        assert not any("forward" in vars(module) for module in faster.modules())
        assert not told.taken
        assert set(told.left.values()) == {"its block is as fast without"}
    else:
        assert "0.stem" in told.taken
    within_rounding(model.double(), faster.double(), torch.randn(4, 8, 12, 12, dtype=torch.float64))


# ---------------------------------------------------------------------------------------- kept, with the run too


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    changes = {"model": "mobilenetv1_025", "plan.batch_size": "2", "preprocessing.size": "32", "curriculum": "none"}
    return make_recipe("photos:scratch", changes)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Measurements take the first of these."""
    given = ["mixed"]

    def measure(model: nn.Module, images: Tensor, known: dict[str, str], **_: object) -> dict[str, str]:
        trees = [path for path, m in model.named_modules() if isinstance(m, (Chain, Sum))]
        assert images.shape == (2, 3, 32, 32)
        assert images[:1].is_contiguous(memory_format=torch.channels_last)
        return {path: known.setdefault("any", given[0]) for path in trees}

    monkeypatch.setattr(training_routes, "measure_routes", measure)
    return given


def routes_in(model: nn.Module) -> set[str]:
    return {m.route.__name__ for m in model.modules() if isinstance(m, (Chain, Sum))}


def run_folder(path: Path, settings: dict[str, object]) -> Path:
    write_sealed_folder(path / "last", {PROGRESS_FILE: json.dumps({"settings": settings}).encode()})
    return path


def test_two_runs_on_one_machine_take_the_same_routes(recipe, answers, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    first, second = create_model(recipe.model), create_model(recipe.model)
    choices = choose_routes_(first, recipe, CPU, None, num_images=10**9)
    assert routes_in(first) == {"mixed"}
    assert "mobilenetv1_025 trains by routes measured on this machine: 27 by mixed" in caplog.text
    answers[0] = "moments"  # what would be measured another time
    assert choose_routes_(second, recipe, CPU, None, num_images=10**9) == choices
    (kept,) = (tmp_path / "cache" / "onefold" / "routes").glob("*.json")
    assert read_sealed_json(kept)["routes"] == {"any": "mixed"}
    assert read_sealed_json(kept)["machine"]["threads"] == torch.get_num_threads()
    kept.write_text(kept.read_text().replace("mixed", "moments"))  # damaged
    assert set(choose_routes_(second, recipe, CPU, None, num_images=10**9).values()) == {"moments"}
    assert "cannot be used (its checksum is not that of what it holds): the routes are measured again" in caplog.text


def test_a_run_goes_on_by_the_routes_that_it_began_with(recipe, answers, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    choices = {"stem.conv": "per_branch", "stages.0.0.conv": "mixed", "no.such": "moments"}
    run = run_folder(tmp_path / "run", {"routes": choices})
    assert routes_of_run(run) == choices
    model = create_model(recipe.model)
    assert choose_routes_(model, recipe, CPU, run, num_images=10**9) == choices
    assert model.get_submodule("stem.conv").route is per_branch
    assert routes_in(model) == {"per_branch", "mixed", "quickest"}
    assert "1 parts of mobilenetv1_025 cannot take the routes that the run began with" in caplog.text
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("route", "device", "goes_on", "taken"),
    [
        ("quickest", "cpu", False, "quickest"),
        ("per_branch", "cpu", False, "per_branch"),
        ("measured", "cuda", False, "quickest"),
        ("measured", "cpu", True, "quickest"),  # of an older version, which measured nothing
    ],
)
def test_where_nothing_is_measured(route, device, goes_on, taken, recipe, answers, tmp_path):
    run = run_folder(tmp_path / "run", {}) if goes_on else None
    model, changed = create_model(recipe.model), replace(recipe, plan=replace(recipe.plan, route=route))
    assert choose_routes_(model, changed, torch.device(device), run, num_images=10**9) is None
    assert routes_in(model) == {taken}


def test_a_short_run_measures_nothing(recipe, answers, tmp_path):
    short = training_routes.LONG_RUN_PIXELS // (recipe.plan.epochs * recipe.preprocessing.size**2)
    model = create_model(recipe.model)
    assert choose_routes_(model, recipe, CPU, None, num_images=short) is None
    assert choose_routes_(model, recipe, CPU, None, num_images=short + 1) is not None


def test_without_a_place_to_keep_them_routes_are_measured_with_a_note(recipe, answers, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file where the folder would be")
    assert set(choose_routes_(create_model(recipe.model), recipe, CPU, None, num_images=10**9).values()) == {"mixed"}
    assert "the measured routes are not kept, another run may take others: cannot write" in caplog.text


@pytest.mark.parametrize(
    ("name", "clear"), [("mobileone_s0", True), ("mobileone_s1", True), ("mobilenetv1_100", False)]
)
def test_what_is_clear_by_count_is_not_measured(name: str, clear: bool):
    images = torch.zeros(1, 3, 224, 224).expand(32, -1, -1, -1)
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            assert measured_routes.is_clear_by_count(create_model(name).train(), images) == clear
