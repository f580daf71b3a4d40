"""What a machine can do at the most, what a fresh process sees, and the controls: values by hand, files made up."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from onefold import bench
from onefold.bench.cold_start import measure_in_this_process
from onefold.bench.machine import current_mhz
from onefold.bench.roofline import cache_sizes
from onefold.cli import bench as bench_verbs
from onefold.commands.bench import latency_bound, load_or_measure_roofline
from onefold.errors import BadArgument, BadData
from onefold.system_resources import pin_to_cpus

MACHINE = bench.Machine(chip="Test Chip 9", architecture="x86_64", cores=4, usable_cores=4, system="Linux 6.1")
QUICK = bench.Procedure(warmup_calls=3, warmup_seconds=0.0, samples=20)


def limit(kind: str, best: float, num_bytes: int | None = None, threads: int = 1) -> bench.PeakRate:
    return bench.PeakRate(
        kind=kind, threads=threads, median=0.9 * best, best=best, how=f"how of {kind}", num_bytes=num_bytes
    )


ROOFLINE = bench.Roofline(
    limits=(
        limit("fp32", 100e9),
        limit("int8", 400e9),
        limit("read", 50e9, 1 << 20),
        limit("read", 10e9, 1 << 28),
        limit("fp32", 190e9, threads=2),
    ),
    features=("avx2",),
)

# ---- the least time --------------------------------------------------------------------------------------------------


def test_the_least_time_is_the_slower_of_computing_and_reading() -> None:
    """100e9 multiply-adds a second make 1e8 of them 1 ms; 1e6 bytes at 50 GB/s make 20 us, 1e8 at 10 GB/s 10 ms."""
    dense = ROOFLINE.latency_bound(bench.Workload(macs=10**8, num_bytes=10**6, precision="fp32"))
    assert (dense.compute_ns, dense.memory_ns, dense.limited_by, dense.how) == (1e6, 2e4, "compute", "how of fp32")
    assert dense.fraction(4e6) == 0.25
    large = ROOFLINE.latency_bound(bench.Workload(macs=10**8, num_bytes=10**8, precision="fp32"))
    assert (large.ns, large.limited_by) == (1e7, "memory")
    assert ROOFLINE.latency_bound(bench.Workload(macs=10**8, num_bytes=10**6, precision="int8")).compute_ns == 2.5e5


def test_what_was_not_measured_has_no_limit() -> None:
    for work in (
        bench.Workload(macs=10**8, num_bytes=1, precision="fp16"),
        bench.Workload(macs=10**8, num_bytes=1, precision="fp32", threads=3),
    ):
        found = ROOFLINE.latency_bound(work)
        assert (found.ns, found.fraction(1e6)) == (None, None)
    two = ROOFLINE.latency_bound(bench.Workload(macs=10**8, num_bytes=1, precision="fp32", threads=2))
    assert two.memory_ns is None
    assert two.ns == pytest.approx(1e8 / 190)
    assert (
        ROOFLINE.latency_bound(bench.Workload(macs=10**8, num_bytes=1, precision="bf16")).compute_ns == 1e6
    )  # done in fp32


def test_of_two_rates_for_one_thing_the_quicker_stays() -> None:
    better = ROOFLINE.merged(
        bench.Roofline(limits=(limit("fp32", 120e9), limit("int8", 1e9), limit("bf16", 7e9)), notes=("a",))
    )
    rates = {(each.kind, each.threads, each.num_bytes): each.best for each in better.limits}
    assert rates["fp32", 1, None] == 120e9
    assert rates["int8", 1, None] == 400e9
    assert rates["bf16", 1, None] == 7e9
    assert len(better.limits) == len(ROOFLINE.limits) + 1
    assert better.merged(better).notes == ("a",)


def test_a_roofline_survives_its_file() -> None:
    assert bench.Roofline.from_dict(json.loads(json.dumps(ROOFLINE.to_dict()))) == ROOFLINE
    damaged = ROOFLINE.to_dict()
    damaged["limits"][0]["best"] = 0.0
    with pytest.raises(ValueError, match="above 0"):
        bench.Roofline.from_dict(damaged)


def test_the_limit_of_a_subject_counts_its_weights_at_their_precision() -> None:
    subject = {"precision": "int8", "macs": 4 * 10**8, "params": 10**6, "batch": 2, "input_shape": (3, 10, 10)}
    found = latency_bound(ROOFLINE, subject, 1)
    assert found is not None
    assert found.compute_ns == pytest.approx(2e6)
    assert found.memory_ns == pytest.approx((10**6 + 4 * 2 * 300) / 50)
    assert latency_bound(ROOFLINE, {"precision": "fp32", "input_shape": (3, 10, 10)}, 1) is None


def test_caches_are_read_from_the_system(tmp_path: Path) -> None:
    described = (("0", "1", "48K", "0"), ("2", "2", "1024K", "0-1"), ("3", "3", "32M", "0-7"))
    for index, level, size, shared in described:
        folder = tmp_path / f"sys/devices/system/cpu/cpu0/cache/index{index}"
        folder.mkdir(parents=True)
        for name, text in (("level", level), ("size", size), ("shared_cpu_list", shared)):
            (folder / name).write_text(f"{text}\n")
    assert cache_sizes(tmp_path) == ((1 << 20, True), (32 << 20, True))
    assert cache_sizes(tmp_path / "nowhere") == ((1 << 20, False),)


def test_a_call_quicker_than_the_limit_casts_doubt_on_it() -> None:
    def at(*samples_ns: int) -> bench.Measurement:
        least = bench.LatencyBound(compute_ns=100.0)
        return bench.Measurement(subject={}, machine=MACHINE, procedure=QUICK, samples_ns=samples_ns, bound=least)

    assert not at(100, 200, 300).beats_roofline
    assert at(99, 200, 300).beats_roofline
    assert at(99, 200, 300).roofline_share == 0.5


# ---- measured here ---------------------------------------------------------------------------------------------------

PRODUCT = """
import os, time
import numpy as np
from onefold.bench.roofline import _measure_limits
a = np.full((768, 768), 0.5, dtype=np.float32)
peaks, product = [], []
for _ in range(3):
    peaks.append(next(_measure_limits(1)).best)
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        product.append(768 ** 3 / (time.perf_counter() - start))
print(max(peaks), sorted(product)[len(product) // 2])
"""


@pytest.mark.slow  # a relation of two rates, which a busy machine may turn round
@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler")
def test_no_matrix_product_is_quicker_than_the_measured_peak() -> None:
    """Taken in turns, one thread each, in a process of its own; a tenth is left to a machine that wanders."""
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    command = [sys.executable, "-c", PRODUCT]
    done = subprocess.run(command, env={**os.environ, **single}, capture_output=True, text=True, check=True)
    peak, product = map(float, done.stdout.split())
    assert 0 < product <= 1.1 * peak


def test_the_limits_are_kept_and_measured_when_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[list[int]] = []

    def measured(threads: list[int]) -> bench.Roofline:
        asked.append(threads)
        return bench.Roofline(limits=tuple(limit("fp32", 1e9 * len(asked), threads=number) for number in threads))

    monkeypatch.setattr("onefold.commands.bench.measure_roofline", measured)
    first = load_or_measure_roofline(tmp_path, [1, 2])
    assert load_or_measure_roofline(tmp_path, [2]) == first
    assert load_or_measure_roofline(tmp_path, [1, 4]).threads == (1, 2, 4)
    assert asked == [[1, 2], [4]]
    again = load_or_measure_roofline(tmp_path, [1], again=True)
    assert max(each.best for each in again.limits if each.threads == 1) == 3e9
    (file,) = tmp_path.iterdir()
    assert file.name == f"{bench.Machine.detect(()).slug}-roofline.json"
    for damaged in ("{", file.read_text().replace("3000000000.0", "4000000000.0")):
        file.write_text(damaged)
        assert load_or_measure_roofline(tmp_path, [1]).threads == (1,)
        assert caplog.text.count("the machine's limits are measured again") == 1
        caplog.clear()


@pytest.mark.parametrize("plain", ["", "plain"])
def test_this_machine_has_limits(plain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiled loops and without: positive, of one thread, and what numpy cannot tell is not there."""
    monkeypatch.setenv("ONEFOLD_PEAKS", plain)
    found = bench.measure_roofline([1])
    kinds = [each.kind for each in found.limits]
    assert found.threads == (1,)
    assert "fp32" in kinds
    assert kinds.count("read") >= 2
    assert all(0 < each.median <= each.best for each in found.limits)
    if plain:
        assert set(kinds) == {"fp32", "read"}
        assert all("numpy" in each.how for each in found.limits)
        assert found.notes == (
            "without compiled loops numpy's product and copy are measured: bf16 and int8 are not known",
        )
    elif shutil.which("c++") or shutil.which("g++"):
        assert found.notes == ()  # on a processor with AMX too, whose loops once ended the process


def test_a_limit_is_measured_without_the_others() -> None:
    assert [each.kind for each in bench.measure_roofline([1], ["fp32"]).limits] == ["fp32"]
    work = bench.Workload(macs=10**9, num_bytes=1 << 20, precision="int8")
    assert ROOFLINE.binding_kind(ROOFLINE.latency_bound(work)) == "int8"
    assert ROOFLINE.binding_kind(ROOFLINE.latency_bound(replace(work, macs=1))) == "read"


# The first int8 loop faults, as an instruction does which the system forbids.
FAULTS = """
import os, signal
from onefold.bench import roofline
real = roofline._multiplying
def faulty(library, kind, which):
    if (kind, which) == (2, 0):
        os.kill(os.getpid(), signal.SIGSEGV)
    return real(library, kind, which)
roofline._multiplying = faulty
"""


@pytest.mark.slow  # it measures this machine twice
@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler")
def test_a_loop_that_ends_its_process_is_left_out_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAULTS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    found = bench.measure_roofline([1])
    (note,) = found.notes
    assert note.endswith(" is left out: its loop was ended by SIGSEGV")
    how = {each.kind: each.how for each in found.limits}
    assert {"fp32", "int8", "read"} <= set(how)
    assert not note.startswith(how["int8"])


def test_a_kind_without_a_limit_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    bench_verbs._print_roofline(bench.Roofline(limits=(limit("fp32", 1e9),), notes=("so it was",)), [1], as_json=False)
    printed = capsys.readouterr()
    assert [line.split("  ")[0] for line in printed.out.splitlines() if "not known" in line] == [
        "multiply-adds in bf16",
        "multiply-adds in int8",
    ]
    assert "so it was" in printed.err


# ---- a fresh process -------------------------------------------------------------------------------------------------

OPENER = """
import numpy as np
def opened(megabytes, noise):
    print(noise)
    kept = np.ones(int(megabytes) << 20, dtype=np.uint8)
    return lambda: int(kept[0])
def broken(_):
    raise ValueError("no such luck")
"""


def test_a_fresh_process_tells_its_times_and_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "opener.py").write_text(OPENER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    seen = bench.measure_cold_start("opener:opened", ["64", "said something"])
    assert min(seen.open_ns, seen.first_ns, seen.warm_ns) > 0
    assert seen.time_to_first_answer_ns == seen.open_ns + seen.first_ns
    if Path("/proc/self/status").exists():
        assert seen.peak_bytes is not None
        assert 64 << 20 <= seen.peak_bytes < 96 << 20
    with pytest.raises(BadData, match="no such luck"):
        bench.measure_cold_start("opener:broken", ["x"])


def test_an_observer_calls_what_it_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "counting.py").write_text("calls = []\ndef opened(word):\n    return lambda: calls.append(word)\n")
    monkeypatch.syspath_prepend(tmp_path)
    measure_in_this_process("counting:opened", ["w"])
    assert sys.modules["counting"].calls == ["w"] * 10


# ---- clocks, processors --------------------------------------------------------------------------------------


def test_the_clock_is_that_of_the_quickest_core_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onefold.bench.machine.cpu_affinity", lambda: (0, 2))
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("cpu MHz\t\t: 1500.5\ncpu MHz\t\t: 2400.0\n")
    assert current_mhz(tmp_path) == 2400.0
    for number, khz in ((0, 800_000), (1, 3_900_000), (2, 3_100_000)):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{number}/cpufreq"
        folder.mkdir(parents=True)
        (folder / "scaling_cur_freq").write_text(f"{khz}\n")
    assert current_mhz(tmp_path) == 3100.0
    assert current_mhz(tmp_path / "nowhere") is None


def test_a_clock_that_changed_is_noise() -> None:
    steady = (1000,) * 100
    slowed = bench.TimingNoise(mhz_before=3000.0, mhz_after=2700.0)
    assert slowed.reasons(steady, MACHINE, 1) == ("The processor's clock went from 3000 to 2700 MHz meanwhile.",)
    assert bench.TimingNoise(mhz_before=3000.0, mhz_after=2900.0).reasons(steady, MACHINE, 1) == ()
    between = bench.TimingNoise.from_counters(bench.SystemCounters(mhz=3000.0), bench.SystemCounters(mhz=2700.0))
    assert between == slowed
    assert bench.TimingNoise.from_dict(slowed.to_dict()) == slowed


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a program choose its processors")
def test_pinning_lasts_as_long_as_its_block() -> None:
    before = os.sched_getaffinity(0)
    one = min(before)
    with pin_to_cpus([one]):
        assert os.sched_getaffinity(0) == {one}
        assert bench.Machine.detect(()).affinity == (one,)
        with pytest.raises(BadArgument, match="no processor 4096; this process may use"), pin_to_cpus([one, 4096]):
            pass
    assert os.sched_getaffinity(0) == before
    with pin_to_cpus(None):
        assert os.sched_getaffinity(0) == before
    with pytest.raises(BadArgument, match="none is named"), pin_to_cpus([]):
        pass


# ---- in the ledger ---------------------------------------------------------------------------------------------------


def test_what_was_found_beside_the_times_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    whole = bench.Measurement(
        subject={"model": "m"},
        machine=MACHINE,
        procedure=QUICK,
        samples_ns=(2_000_000,) * 20,
        bound=bench.LatencyBound(compute_ns=1e6, memory_ns=2e4, how="by hand"),
        cold=bench.ColdStart(open_ns=5, first_ns=4, warm_ns=3, peak_bytes=None),
    )
    bench.append_results(path, [whole])
    assert bench.read_measurements(path) == [whole]
    line = json.loads(path.read_text())
    assert line["summary"]["roofline"] == whole.roofline_share == 0.5
    for name in ("bound", "cold", "checksum"):  # as lines were before there were any
        del line[name]
    path.write_text(json.dumps(line) + "\n")
    (bare,) = bench.read_results(path).measurements
    assert (bare.bound, bare.cold, bare.roofline_share) == (None, None, None)
    line["cold"] = {"open_ns": "x"}
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(BadData, match="line 1"):
        bench.read_measurements(path)


def test_a_self_test_is_kept_with_its_floor(tmp_path: Path) -> None:
    now = iter(range(0, 10**9, 1000))
    instruments = bench.Instruments(clock=lambda: next(now), vitals=bench.SystemCounters, machine=MACHINE)
    tested = bench.compare_with_itself(lambda: None, QUICK, {"name": "n", "model": "m"}, instruments)
    assert list(tested.measurements) == ["n"]
    assert tested.sentences() == []
    bench.append_results(tmp_path / "r.jsonl", [tested])
    assert bench.read_results(tmp_path / "r.jsonl").comparisons == (tested,)
    floor = json.loads((tmp_path / "r.jsonl").read_text())["floor"]
    assert math.isclose(floor["floor"], tested.floor.floor, abs_tol=1e-12)
