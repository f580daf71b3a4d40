"""What damaged and forged files do to the command line: how many of each kind are refused, said, or believed.

    python benchmarks/fuzz_files.py [--count 3000] [--seed 0] [--kinds weights,run,artifact,...] [--seconds 400]
                                    [--work FOLDER] [--out FILE]

For each kind there are files as they should be and the commands that open them. A trial damages one file - a bit or
three flipped, the end cut off, a page zeroed, two pieces exchanged, another file in its place, nesting without end -
and runs one of those commands in a fork of this process. Of the kinds `forged` are artifacts whose checksums were set
right again after that, for every runtime that is installed (ONNX Runtime Web where ONEFOLD_NODE_MODULES names its
package). Core ML runs nowhere but on a Mac; here its packages are unpacked (`unzip`), and its artifacts reported and
refused. Counted are:

    refused    exit status 2 to 10: one sentence that says why
    said       exit status 0, with a line on stderr that the undamaged file does not cause
    same       exit status 0, and the same answer: what was damaged decides nothing
    other      exit status 0 and another answer where there is no checksum: photos, labels, other projects' weights
    BELIEVED   exit status 0, another answer, and nothing said
    SIGNAL, TRACEBACK (or exit status 70), SLOW (more than 20 s), LARGE (more than 2 GB resident, with its children)

`--work` keeps the files for the next call; `--out` gets one JSON object for each trial.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import importlib
import io
import json
import os
import pkgutil
import random
import re
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import onefold
from onefold.cli import main
from onefold.errors import OnefoldError
from onefold.models import create_model
from onefold.models.load_model import Card, save_pretrained
from onefold.runtimes import RUNTIMES
from onefold.runtimes.artifact import Artifact, hash_files, read_manifest, render_manifest
from onefold.runtimes.coreml import unzip_mlpackage

LIMIT_S, LIMIT_BYTES = 20, 2 << 30
NOTED = re.compile(
    r"could not be used|was changed|is not the one|cannot be|damaged|left out|missing|not finished|is empty"
)
NAME = "mobilenetv1_025"


@dataclass(frozen=True)
class Kind:
    """Files to damage, as patterns, and commands that open them."""

    files: tuple[str, ...]
    commands: tuple[str, ...]
    has_checksum: bool = True
    is_refused: bool = False  # undamaged, too: this machine cannot run it


PREDICT = "predict {} x.png --json --threads 1"
EVAL = "eval lone.safetensors --data {} --json --threads 1"
FOREIGN = f"{PREDICT} --model {NAME}"
KINDS = {
    "lone weights": Kind(
        ("lone.safetensors",), (PREDICT.format("lone.safetensors"), "fuse lone.safetensors --out f.safetensors")
    ),
    "fused weights": Kind(("fused.safetensors",), (PREDICT.format("fused.safetensors"),)),
    "best/": Kind(("run/best/*",), (PREDICT.format("run"), "fuse run --out f.safetensors")),
    "last/": Kind(("run/last/*", "run/previous/*"), ("train --resume run", "report run --out r.html")),
    "run": Kind(
        ("run/*.json", "run/*.jsonl", "run/images.csv"),
        ("train --resume run", "report run --out r.html", "eval run --json --threads 1"),
    ),
    "artifact": Kind(("artifacts/*/*",), (PREDICT.format("{artifact}"),)),
    "forged": Kind(("artifacts/*/model.*",), (PREDICT.format("{artifact}"),), has_checksum=False),
    "forged timed": Kind(
        ("artifacts/*/model.*",), ("bench {artifact} --samples 5 --warmup 0.01 --results results",), has_checksum=False
    ),
    "Core ML": Kind(("packages/*/*",), ("predict {artifact} x.png",), is_refused=True),
    "forged Core ML": Kind(("packages/*/model.*",), ("unzip {file}", "report {artifact} --out r.html"), False),
    "torch.save": Kind(("w.pth", "old.pth"), (FOREIGN.format("{file}"),), has_checksum=False),
    "npz and HDF5": Kind(("w.npz", "w.h5"), (FOREIGN.format("{file}"),), has_checksum=False),
    "foreign safetensors": Kind(("foreign.safetensors",), (FOREIGN.format("{file}"),), has_checksum=False),
    "hub folder": Kind(("hub/config.json", "hub/model.safetensors"), (PREDICT.format("hub"),)),
    "tar": Kind(("d.tar",), (EVAL.format("d.tar"),), has_checksum=False),
    "Parquet": Kind(("d.parquet",), (EVAL.format("d.parquet"),), has_checksum=False),
    "table": Kind(("t/labels.csv", "t/labels.jsonl"), (EVAL.format("{file}"),), has_checksum=False),
    "images": Kind(("i/*",), ("predict lone.safetensors {file} --json --threads 1",), has_checksum=False),
    "results": Kind(("results/[!.]*.jsonl", "results/accuracy.json"), ("report results --out r.html",)),
    "class names": Kind(
        ("names.txt", "names.json"), (PREDICT.format("lone.safetensors") + " --classes {file}",), has_checksum=False
    ),
    "cache": Kind(
        ("cache/onefold/tars/*.json", "cache/onefold/*/library.so", "cache/onefold/*/manifest.json"),
        (EVAL.format("d.tar"),),
    ),
}


# ------------------------------------------------------------------------------------ files as they should be


def make_files() -> None:
    """Write a sample of everything that a command opens to the current folder."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save("x.png")
    for split, count in (("train", 6), ("val", 3)):
        for name in ("a", "b"):
            Path("d", split, name).mkdir(parents=True)
            for i in range(count):
                shade = np.array([200, 60, 60] if name == "a" else [60, 60, 200])
                pixels = (shade + rng.integers(-40, 40, (40, 40, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(Path("d", split, name, f"{i}.png"))
    train = f"train --recipe photos:scratch --model {NAME} --img-size 32 --epochs 2 -b 4 --data d --out run"
    must(train)
    must("fuse run --out fused.safetensors")
    shutil.copy("run/best/model.safetensors", "lone.safetensors")
    with tarfile.open("d.tar", "w") as tar:
        tar.add("d/val", "val")
    tensors = {name: tensor.contiguous() for name, tensor in torch_weights("lone.safetensors").items()}
    torch.save(tensors, "w.pth")
    torch.save(tensors, "old.pth", _use_new_zipfile_serialization=False)
    np.savez("w.npz", **{name: tensor.numpy() for name, tensor in tensors.items()})
    save_file(tensors, "foreign.safetensors")
    with contextlib.suppress(ImportError):
        import h5py

        with h5py.File("w.h5", "w") as file:
            for name, tensor in tensors.items():
                file[name] = tensor.numpy()
    model = create_model(NAME, num_classes=2).eval()
    save_pretrained(model, "hub", Card(model=NAME, num_classes=2, classes=("a", "b")))
    with contextlib.suppress(ImportError):
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [{"bytes": path.read_bytes(), "path": path.name} for path in sorted(Path("d/val").rglob("*.png"))]
        pq.write_table(pa.table({"image": rows, "label": ["a"] * 3 + ["b"] * 3}), "d.parquet")
    shutil.copytree("d/val", "t")
    names = [path.relative_to("t").as_posix() for path in sorted(Path("t").rglob("*.png"))]
    Path("t/labels.csv").write_text("file_name,label\n" + "".join(f"{name},{name[0]}\n" for name in names))
    lines = (json.dumps({"file_name": name, "label": name[0]}) + "\n" for name in names)
    Path("t/labels.jsonl").write_text("".join(lines))
    Path("i").mkdir()
    picture = Image.open("x.png").resize((64, 64))
    for suffix in ("png", "jpg", "bmp", "gif", "tif", "webp", "ppm"):
        with contextlib.suppress(OSError, KeyError):
            picture.save(Path("i", f"x.{suffix}"))
    Path("names.txt").write_text("ant\nbee\n")
    Path("names.json").write_text('["ant", "bee"]')
    for runtime in RUNTIMES:
        if runtime not in ("coreml", "tensorrt"):  # a Mac, a GPU
            quietly(f"export fused.safetensors --to {runtime} --out artifacts".split())
    quietly(["export", "fused.safetensors", "--to", "coreml", "--out", "packages"])
    must("eval artifacts/onnx-fp32 --data d --json --threads 1")  # writes results/accuracy.json
    must("bench artifacts/onnx-fp32 --samples 16 --warmup 0.01")
    shutil.copytree("artifacts/onnx-fp32", "results/onnx-fp32")
    must("eval lone.safetensors --data d.tar --json --threads 1")  # fills the cache


def torch_weights(path: str) -> dict[str, torch.Tensor]:
    """Read the tensors of a safetensors file."""
    from safetensors.torch import load_file

    return load_file(path)


def save_file(tensors: dict[str, torch.Tensor], path: str) -> None:
    """Write them as another project would."""
    from safetensors.torch import save_file as save

    save(tensors, path, {"format": "pt"})


def quietly(arguments: list[str]) -> tuple[int, str, str]:
    """Run the command line in this process: exit status, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    return status, out.getvalue(), err.getvalue()


def must(command: str) -> None:
    """Run a command that has to succeed."""
    status, _, err = quietly(command.split())
    if status:
        print(f"{command}: {status}\n{err}", flush=True)
        os._exit(1)


# ------------------------------------------------------------------------------------------------ damage


HOW = ("bit", "bit", "bit", "three bits", "cut", "zeros", "exchanged", "foreign", "number", "longer", "deep")


def damage(rng: random.Random, content: bytes, others: list[bytes]) -> tuple[str, bytes]:
    """Give what was done to some bytes, and what they are then: never what they were."""
    how = rng.choice(
        ["bit", "bit", "bit", "three bits", "cut", "zeros", "exchanged", "foreign", "number", "longer", "deep"]
    )
    data = bytearray(content)
    at = rng.randrange(max(1, len(data)))
    if how in ("bit", "three bits") and data:
        for _ in range(3 if how == "three bits" else 1):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del data[at:]
    elif how == "zeros":
        data[at : at + 4096] = bytes(len(data[at : at + 4096]))
    elif how == "exchanged":
        size = rng.choice([1, 16, 512])
        there = rng.randrange(max(1, len(data)))
        data[at : at + size], data[there : there + size] = data[there : there + size], data[at : at + size]
    elif how == "foreign":
        data = bytearray(rng.choice(others))
    elif how == "number":
        data[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\0\0\0\0"])
    elif how == "longer":
        data += rng.randbytes(rng.randrange(1, 200))
    elif how == "deep":
        data = bytearray(rng.choice([b"[", b'{"a":']) * 20_000)
    return (how, bytes(data)) if bytes(data) != content else damage(rng, content, others)


def reseal(folder: Path) -> None:
    """Set the checksums of an artifact right again, as a forger does."""
    artifact = read_manifest(folder)
    (folder / "manifest.json").unlink()
    files = hash_files(folder)
    changed = Artifact(**{**{name: getattr(artifact, name) for name in artifact.__dataclass_fields__}, "files": files})
    (folder / "manifest.json").write_text(render_manifest(changed), encoding="utf-8")


# ------------------------------------------------------------------------------------------------- trials


@dataclass
class Trial:
    """One damaged file and what a command made of it."""

    kind: str
    file: str
    how: str
    command: str
    outcome: str
    status: int
    seconds: float
    bytes: int
    said: str


def forked(command: str, limit_s: float) -> tuple[int, str, str, float, int]:
    """Run a command in a fork: status (negative: the signal), stdout, stderr, seconds, most bytes resident."""
    started = time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            status = 70
            try:
                os.setsid()
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
                forget_libraries()
                status = unzip(Path(command.split()[1])) if command.startswith("unzip ") else main(command.split())
            except BaseException as error:
                print(f"Traceback: {type(error).__name__}: {error}", file=sys.stderr)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
                largest = max(usage.ru_maxrss for usage in usages)
                os.write(2, f"\n#{largest}".encode())
                os._exit(status)
        ended = 0
        while not ended:
            ended, code, usage = os.wait4(pid, os.WNOHANG)
            if not ended:
                if time.monotonic() - started > limit_s:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(pid, signal.SIGKILL)
                time.sleep(0.005)
        out.seek(0)
        err.seek(0)
        errors, _, largest = err.read().decode(errors="replace").rpartition("\n#")
        memory = 1024 * int(largest) if largest.isdigit() else 1024 * usage.ru_maxrss
        seconds, said = time.monotonic() - started, out.read().decode(errors="replace")
        return os.waitstatus_to_exitcode(code), said, errors, seconds, memory


def unzip(archive: Path) -> int:
    """Unpack a Core ML package as a Mac does before it opens one: exit status as a command has it."""
    try:
        unzip_mlpackage(archive.read_bytes(), Path("unpacked.mlpackage"))
    except OnefoldError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    files = sorted(path for path in Path("unpacked.mlpackage").rglob("*") if path.is_file())
    print(*(hashlib.sha256(path.read_bytes()).hexdigest() for path in files))
    return 0


def forget_libraries() -> None:
    """Have compiled libraries opened again, as in a fresh process."""
    for module in list(sys.modules.values()):
        loaded = getattr(module, "_library", None)
        if getattr(module, "__name__", "").startswith("onefold.") and hasattr(loaded, "cache_clear"):
            loaded.cache_clear()


def plain(text: str) -> str:
    """What a command printed without times, which differ from run to run."""
    return re.sub(r"[0-9.]+ (ms|s|images/s)\b|in [0-9.]+|\d+:\d\d(:\d\d)?", "", text)


def product(command: str) -> str:
    """The page that a command wrote, if it did: its notes stand in it."""
    page = Path("r.html")
    return page.read_text(encoding="utf-8", errors="replace") if "r.html" in command and page.is_file() else ""


def outcome_of(kind: Kind, trial: tuple[int, str, str, float, int], before: tuple[int, str, str, float, int]) -> str:
    """Say what became of a damaged file; see the top of this file."""
    status, out, err, seconds, memory = trial
    if seconds > LIMIT_S:
        return "SLOW"
    if memory > LIMIT_BYTES:
        return "LARGE"
    if status < 0:
        return "SIGNAL"
    if status == 70 or "Traceback" in err:
        return "TRACEBACK"
    if status:
        return "refused"
    new = set(plain(err).splitlines()) - set(plain(before[2]).splitlines())
    if any(line.startswith(("note:", "warning:")) for line in new):
        return "said"
    if plain(out) == plain(before[1]):
        return "same"
    if len(NOTED.findall(out)) > len(NOTED.findall(before[1])):
        return "said"
    return "BELIEVED" if kind.has_checksum else "other"


def trials(root: Path, kinds: list[str], count: int, seed: int, seconds: float) -> Iterator[Trial]:
    """Run the trials, each on a copy of the files; the kinds take turns."""
    rng, ends = random.Random(seed), time.monotonic() + seconds
    pristine, before = root / "pristine", dict[str, tuple[int, str, str, float, int]]()
    scratch = root / f"scratch-{seed}"
    for number in range(count):
        if time.monotonic() > ends:
            return
        name = kinds[number % len(kinds)]
        kind = KINDS[name]
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(pristine, scratch)
        os.chdir(scratch)
        os.environ["XDG_CACHE_HOME"] = str(scratch / "cache")
        if name == "cache":  # an index is of this very file, and not of its copies
            forked(kind.commands[0], 120)
        files = [path for pattern in kind.files for path in sorted(Path().glob(pattern)) if path.is_file()]
        if not files:
            continue
        file = rng.choice(files)
        command = rng.choice(kind.commands).format(file=file, artifact=file.parent)
        if command not in before:
            before[command] = forked(command, 120)
            before[command] = (before[command][0], before[command][1] + product(command), *before[command][2:])
            if before[command][0] and not kind.is_refused:
                raise SystemExit(f"{command}: {before[command]}")
            shutil.rmtree(scratch)
            shutil.copytree(pristine, scratch)
            os.chdir(scratch)
        others = [Path(each).read_bytes() for each in ("x.png", "names.json", "fused.safetensors", "w.pth", "d.tar")]
        how, content = damage(rng, file.read_bytes(), others)
        file.unlink()  # a library may be mapped by this very process
        file.write_bytes(content)
        if name.startswith("forged"):
            reseal(file.parent)
        seen = forked(command, 3 * LIMIT_S)
        seen = (seen[0], seen[1] + product(command), *seen[2:])
        said = next((line for line in seen[2].splitlines() if line.startswith(("error:", "Traceback"))), "")
        outcome = outcome_of(kind, seen, before[command])
        yield Trial(name, str(file), how, command, outcome, seen[0], round(seen[3], 2), seen[4], said[:300])


def table(rows: list[Trial]) -> str:
    """Give the outcomes by kind, and the worst time and memory."""
    outcomes = ["refused", "said", "same", "other", "BELIEVED", "SIGNAL", "TRACEBACK", "SLOW", "LARGE"]
    lines = [f"{'kind':20} {'trials':>7} " + " ".join(f"{each:>9}" for each in outcomes) + "  slowest   largest"]
    for kind in [*dict.fromkeys(row.kind for row in rows), "all"]:
        those = [row for row in rows if kind in (row.kind, "all")]
        counts = Counter(row.outcome for row in those)
        worst = f"{max(row.seconds for row in those):7.1f} s {max(row.bytes for row in those) / 2**20:6.0f} MiB"
        lines.append(f"{kind:20} {len(those):7} " + " ".join(f"{counts[each]:9}" for each in outcomes) + f"  {worst}")
    return "\n".join(lines)


def run() -> None:
    """Make the files, run the trials, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    root = (given.work or Path(tempfile.mkdtemp(prefix="fuzz-files-"))).absolute()
    out = given.out.absolute() if given.out else None
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    if not (root / "pristine").is_dir():
        making = root / "making"
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        os.chdir(making)
        os.environ["XDG_CACHE_HOME"] = str(making / "cache")
        maker = os.fork()  # converters bring gigabytes of packages, which no trial shall count
        if not maker:
            make_files()
            os._exit(0)
        if os.waitpid(maker, 0)[1]:
            raise SystemExit("the files could not be made: why is said above")
        making.rename(root / "pristine")
    for module in pkgutil.walk_packages(onefold.__path__, "onefold."):  # once, and not in each fork
        if "kernels.triton" not in module.name and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for package in ("h5py", "pyarrow.parquet", "matplotlib.pyplot"):
        with contextlib.suppress(ImportError):
            importlib.import_module(package)
    gc.freeze()  # or each fork would copy what a collection touches
    rows = []
    for trial in trials(root, given.kinds.split(","), given.count, given.seed, given.seconds):
        rows.append(trial)
        if trial.outcome.isupper():
            print(json.dumps(asdict(trial)), flush=True)
        if out:
            with out.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(asdict(trial)) + "\n")
    print(table(rows))


if __name__ == "__main__":
    run()
