"""Routes within the rest of torch: each thing torch can do with a model it does with every route as with `per_branch`.

Autocast, memory formats, torch.compile, accumulated and checkpointed gradients, processes, frozen parts, hooks, copies.
"""

from __future__ import annotations

import copy
import faulthandler
import io
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from onefold.reparam import Chain, Route, Sum, conv_act, mixed, moments, per_branch, quickest, set_route_
from onefold.train.distributed import process_group
from test_routes import batch, gap, unit

ROUTES = (moments, mixed, quickest)
SHAPES = {"pointwise": (16, 16, 1, 1, 1, 4), "depthwise": (16, 16, 3, 1, 16, 4)}
CLOSE = 1e-5  # float32 through the compiled kernels; absolute against values of order one, relative above


@pytest.fixture(params=ROUTES, ids=lambda route: route.__name__)
def route(request: pytest.FixtureRequest) -> Route:
    return request.param


class Net(nn.Module):
    """Three units, each with its activation: a dense stem, a depthwise and a pointwise one."""

    def __init__(self, route: Route = per_branch) -> None:
        super().__init__()
        self.units = nn.ModuleList([unit(3, 8, 3, 2, 1, 1), unit(8, 8, 3, 1, 8, 2), unit(8, 16, 1, 1, 1, 2)])
        self.act = nn.ReLU()
        set_route_(self, route)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.units:
            x = conv_act(layer, self.act, x)
        return x


def lively(model: nn.Module) -> nn.Module:
    """Random gains and biases, so that gradients of all norms differ."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
    return model


def pair(model: nn.Module, route: Route) -> tuple[nn.Module, nn.Module]:
    """Two equal models, evaluated by `per_branch` and by `route`."""
    lively(model)
    return set_route_(copy.deepcopy(model), per_branch), set_route_(model, route)


def image(*shape: int) -> Tensor:
    return batch(*shape).float()


def waves(y: Tensor, number: int | None = None) -> Tensor:
    """Weights for a batch of outputs, of `number` images if that is not its own."""
    shape = (number or len(y), *y.shape[1:])
    return torch.arange(torch.Size(shape).numel(), dtype=y.dtype).mul(0.37).sin().view(shape)


def loss_of(y: Tensor) -> Tensor:
    return (y * waves(y)).mean() * 10


def step(model: nn.Module, x: Tensor, *, leaf: bool = True, run: Callable[..., Tensor] | None = None) -> dict:
    """One forward and backward, and all that came of it; `run` evaluates the model in another way."""
    x = x.detach().clone().requires_grad_(leaf)
    y = model(x) if run is None else run(model, x)
    loss_of(y).backward()
    return record(model, y, x)


def record(model: nn.Module, y: Tensor, x: Tensor) -> dict[str, Tensor | None]:
    grads = {f"d {name}": None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    return {"y": y.detach(), "dx": x.grad, **grads, **buffers}


def must_agree(ours: dict, theirs: dict, bound: float = CLOSE) -> None:
    assert ours.keys() == theirs.keys()
    gaps = {name: gap(theirs[name], ours[name]) for name in theirs}
    worst = max(gaps, key=gaps.__getitem__)
    assert gaps[worst] <= bound, (worst, gaps[worst])


def low(model: nn.Module, x: Tensor, dtype: torch.dtype, autocast: bool, scale: float) -> dict[str, Tensor]:
    """Outputs and gradients of a model in lower precision, the loss scaled as a GradScaler scales it."""
    x = x.to(dtype).requires_grad_()
    model = model if autocast else model.to(dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        y = model(x)
    assert y.dtype == dtype
    (loss_of(y.float()) * scale).backward()
    grads = {name: p.grad.double() / scale for name, p in model.named_parameters()}
    return {"y": y.detach().double(), "dx": x.grad.double() / scale, **grads}


def distances(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    return {name: ((found[name] - t).norm() / t.norm().clamp_min(1e-3)).item() for name, t in truth.items()}


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "whole"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_half_precision_is_as_near_the_truth_as_each(shape, dtype, autocast, route, seeded):
    reference, ours = pair(unit(*shape), route)
    x = image(8, 16, 14, 14).to(dtype).float()
    scale = 1024.0 if dtype == torch.float16 else 1.0
    exact = copy.deepcopy(reference).double()
    if not autocast:  # the truth of the weights as rounded
        exact.load_state_dict(copy.deepcopy(reference).to(dtype).double().state_dict())
    truth = low(exact, x, torch.float64, False, 1.0)
    theirs, mine = (distances(low(m, x, dtype, autocast, scale), truth) for m in (reference, ours))
    eps = torch.finfo(dtype).eps
    assert mine["y"] <= 1.5 * theirs["y"]
    for name, distance in mine.items():
        assert distance <= max(1.5 * theirs[name], 8 * eps), (name, distance, theirs[name])


@pytest.mark.parametrize(("route", "start"), [(moments, 0), (moments, 1), (mixed, 1), (quickest, 1)])
def test_channels_last_stays_so_and_changes_no_number(route, start, seeded):
    """A channels_last stem by `moments` alone: torch 2.13's own weight gradient of a strided 1x1 convolution of fewer
    than 8 channels, channels_last, writes past its memory on a CPU (oneDNN), so `per_branch` and `mixed` may crash.
    """
    reference, model = pair(Net(), route)
    for net in (reference, model):
        net.units = net.units[start:]
    x = image(4, 8 if start else 3, 12, 10)
    wide = x.contiguous(memory_format=torch.channels_last)
    results = [step(copy.deepcopy(model), v) for v in (x, wide)]
    for result in results:
        must_agree(result, step(copy.deepcopy(reference), x))
    must_agree(results[1], results[0], 1e-6)
    assert results[1]["y"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks at it
def test_compiled_by_dynamo(route, seeded):
    try:
        torch.compile(torch.sin, backend="eager")(torch.ones(1))
    except RuntimeError as error:
        pytest.skip(f"torch.compile does not run here: {error}")
    torch._dynamo.reset()
    reference, model = pair(Net(), route)
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        x = image(4, 3, 12, 12)
        must_agree(step(model, x, run=lambda _, leaf: compiled(leaf)), step(reference, x))


def test_gradients_accumulate_over_pieces(route, seeded):
    reference, model = pair(Net(), route)
    for piece in image(8, 3, 12, 12).split(4):
        must_agree(step(model, piece), step(reference, piece))


def test_checkpointed_units_are_evaluated_twice_as_each_is(route, seeded):
    """Gradients are equal; running statistics move at the forward and again at its repetition, by every route."""

    def run(model: nn.Module, x: Tensor) -> Tensor:
        for layer in model.units:
            x = checkpoint(conv_act, layer, model.act, x, use_reentrant=False)
        return x

    reference, model = pair(Net(), route)
    plain, x = copy.deepcopy(model), image(4, 3, 12, 12)
    ours, once = step(model, x, run=run), step(plain, x)
    must_agree(ours, step(reference, x, run=run))
    must_agree({k: v for k, v in ours.items() if k[0] == "d"}, {k: v for k, v in once.items() if k[0] == "d"}, 1e-6)
    assert {int(v) for k, v in ours.items() if k.endswith("num_batches_tracked")} == {2}


@pytest.fixture
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def test_two_runs_are_equal_to_the_bit(route, seeded, deterministic):
    """Deterministic torch also fills new memory with NaN: nothing is read before it is written."""
    reference, model = pair(Net(), route)
    x = image(4, 3, 12, 12)
    first, second = step(copy.deepcopy(model), x), step(copy.deepcopy(model), x)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    must_agree(first, step(reference, x))


SPLITS = {"halves": (4, 4), "unequal": (3, 5)}
BOUNDS = {torch.float64: 1e-10, torch.float32: CLOSE}


def shard(rank: int, folder: str) -> None:
    """One of two processes: its part of every joint batch, by DDP and synchronized norms."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the host's name need not be one that can be looked up
    faulthandler.dump_traceback_later(120)  # who waits for whom, should they ever
    with process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2):
        for name, sizes in SPLITS.items():
            for dtype in BOUNDS:
                one_step(rank, sizes, dtype, Path(folder), name)


def one_step(rank: int, sizes: tuple[int, int], dtype: torch.dtype, folder: Path, name: str) -> None:
    net = torch.load(folder / "net.pt", weights_only=False).to(dtype)
    network = DistributedDataParallel(set_route_(net, moments))
    network.module = nn.SyncBatchNorm.convert_sync_batchnorm(net)  # only now: DDP refuses them on a CPU
    assert any(isinstance(m, nn.SyncBatchNorm) for m in network.modules())
    x = batch(8, 3, 12, 12).to(dtype).split(sizes)[rank].clone().requires_grad_()
    y = network(x)
    ((y * waves(y, 8).split(sizes)[rank]).sum() * 2 / waves(y, 8).numel() * 10).backward()
    torch.save(record(net, y, x), folder / f"{name}-{dtype}-{rank}.pt")


def test_two_processes_with_synchronized_norms_are_one_on_the_joint_batch(tmp_path: Path, seeded):
    """Each process's loss is twice its part of the joint mean, as DDP takes the mean of the two gradients."""
    net = lively(Net())
    torch.save(net, tmp_path / "net.pt")
    torch.multiprocessing.spawn(shard, (str(tmp_path),), nprocs=2)
    for name in SPLITS:
        for dtype, bound in BOUNDS.items():
            joint = step(copy.deepcopy(net).to(dtype), batch(8, 3, 12, 12).to(dtype))
            one, two = (torch.load(tmp_path / f"{name}-{dtype}-{rank}.pt") for rank in (0, 1))
            whole = {"y": torch.cat([one["y"], two["y"]]), "dx": torch.cat([one["dx"], two["dx"]]) / 2}
            for mine in (one, two):
                must_agree({**mine, **whole}, joint, bound)


def branches(*, bias: bool = False, **norm: object) -> Sum:
    """A depthwise unit whose norms and convolutions have these arguments."""
    convs = [nn.Conv2d(8, 8, k, padding=k // 2, groups=8, bias=bias) for k in (3, 3, 1)]
    return Sum(*(Chain(c, nn.BatchNorm2d(8, **norm)) for c in convs), nn.BatchNorm2d(8, **norm))


def frozen(*, whole: bool) -> Sum:
    sums = unit(8, 8, 3, 1, 8, 2)
    for norm in [m for m in sums.modules() if isinstance(m, nn.BatchNorm2d)][: None if whole else 1]:
        norm.eval()
    return sums


UNUSUAL = {
    "one norm frozen": lambda: frozen(whole=False),
    "all norms frozen": lambda: frozen(whole=True),
    "all in eval": lambda: branches().eval(),
    "cumulative": lambda: branches(momentum=None),
    "not affine": lambda: branches(affine=False),
    "no statistics": lambda: branches(track_running_stats=False),
    "no statistics, in eval": lambda: branches(track_running_stats=False).eval(),
    "bias before the norm": lambda: branches(bias=True),
    "pointwise, bias, cumulative": lambda: Sum(
        Chain(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, momentum=None)), nn.BatchNorm2d(8, affine=False)
    ),
    "a chain alone": lambda: Chain(nn.Conv2d(8, 4, 3, padding=1), nn.BatchNorm2d(4)),
}


@pytest.mark.parametrize("make", UNUSUAL.values(), ids=UNUSUAL.keys())
def test_norms_in_unusual_states(make, route, seeded):
    reference, model = pair(nn.Sequential(make(), nn.ReLU()), route)
    for seed in range(2):
        x = image(4, 8, 7, 6) + 0.1 * seed
        ours, theirs = step(model, x), step(reference, x)
        for name in [key for key in ours if key.startswith("d ") and key.endswith(".0.bias")]:
            noise = max(ours.pop(name).abs().max(), theirs.pop(name).abs().max())
            assert noise <= 1e-4, name  # before a norm: exactly 0, but for rounding
        must_agree(ours, theirs)
        counts = [k for k in theirs if k.endswith("num_batches_tracked")]
        assert all(torch.equal(ours[k], theirs[k]) for k in counts)


def test_a_hooked_convolution_is_heard_by_the_quickest_route(seeded):
    reference, model = pair(Net(), quickest)
    heard = []
    for net in (reference, model):
        conv = net.units[1][0][0]
        conv.register_forward_hook(lambda module, inputs, output: heard.append(output.detach()))
    x = image(4, 3, 12, 12)
    must_agree(step(model, x), step(reference, x))
    assert len(heard) == 2
    assert gap(*heard) <= CLOSE


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.BatchNorm2d, nn.Module], ids=["convs", "norms", "all"])
def test_what_needs_no_gradient_gets_none(kind, route, seeded):
    """Also the first input; where nothing needs one, the output does not either."""
    reference, model = pair(Net(), route)
    for net in (reference, model):
        for module in net.units[:2].modules():
            if isinstance(module, kind):
                module.requires_grad_(False)
    x = image(4, 3, 12, 12)
    ours, theirs = step(model, x, leaf=False), step(reference, x, leaf=False)
    must_agree(ours, theirs)
    assert ours["dx"] is None
    assert any(ours[f"d {name}"] is None for name, _ in model.named_parameters())


def test_a_retained_graph_gives_the_same_gradients_again(route, seeded):
    reference, model = pair(Net(), route)
    x = image(4, 3, 12, 12).requires_grad_()
    loss = loss_of(model(x))
    wanted = [x, *model.parameters()]
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    second = torch.autograd.grad(loss, wanted)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    theirs = step(reference, x.detach())
    names = ["dx", *(f"d {name}" for name, _ in model.named_parameters())]
    must_agree(dict(zip(names, first, strict=True)), {name: theirs[name] for name in names})


def test_without_gradients_training_mode_still_moves_the_statistics(route, seeded):
    reference, model = pair(Net(), route)
    x = image(4, 3, 12, 12)
    with torch.no_grad():
        ys = [net(x) for net in (reference, model)]
    assert not ys[1].requires_grad
    assert gap(*ys) <= CLOSE
    must_agree(dict(model.named_buffers()), dict(reference.named_buffers()))


def saved(model: nn.Module) -> nn.Module:
    """A new model with the saved weights of this one, read as weights only."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = set_route_(Net(), model.units[0].route)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model)), "saved": saved}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES.keys())
def test_copies_of_a_trained_model_train_on(duplicate, route, seeded):
    """By the same route, and without touching the model."""
    reference, model = pair(Net(), route)
    x = image(4, 3, 12, 12)
    for net in (reference, model):
        step(net, x)
        net.zero_grad()
    twin = duplicate(model)
    assert all(layer.route is route for layer in twin.units)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    must_agree(step(twin, x), step(reference, x))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_an_average_of_weights_follows_and_trains(route, seeded):
    reference, model = pair(Net(), route)
    x, averages = image(4, 3, 12, 12), []
    for net in (reference, model):
        average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            step(net, x)
            optimizer.step()
            average.update_parameters(net)
        averages.append(average.module)
    must_agree(step(averages[1], x), step(averages[0], x), 10 * CLOSE)  # three steps apart
