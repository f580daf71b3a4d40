"""The stopwatch, with made-up clocks: no test here reads the time of day."""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onefold import bench, system_resources
from onefold.bench.measurement import random_orders
from onefold.bench.timing_noise import (
    max_discarded_samples,
    paired_ratio_interval,
    percentile_confidence_bound,
    pooled_ratio_interval,
)
from onefold.errors import BadArgument, BadData, NotWritable

MACHINE = bench.Machine(chip="Test Chip 9", architecture="x86_64", cores=4, usable_cores=4, system="Linux 6.1")
QUICK = bench.Procedure(warmup_calls=3, warmup_seconds=0.0, samples=64)


class FakeClock:
    """Time that moves by `step` at each reading, and by what a call says it takes."""

    def __init__(self, step: int = 1) -> None:
        self.read = 0
        self.step = step

    def __call__(self) -> int:
        self.read += self.step
        return self.read

    def call(self, duration: Callable[[], float]) -> Callable[[], None]:
        def spend() -> None:
            self.read += int(duration())

        return spend


def instruments(
    clock: FakeClock, before: bench.SystemCounters | None = None, after: bench.SystemCounters | None = None
):
    looks = iter([before or bench.SystemCounters(), after or bench.SystemCounters()])
    return bench.Instruments(clock=clock, vitals=lambda: next(looks), machine=MACHINE)


def measurement(
    samples_ns: list[int] | range, noise: bench.TimingNoise | None = None, **more: object
) -> bench.Measurement:
    values = {"subject": {}, "machine": MACHINE, "procedure": QUICK, "noise": noise or bench.TimingNoise(), **more}
    return bench.Measurement(samples_ns=tuple(samples_ns), **values)


def drifting(rounds: int, seed: int) -> tuple[np.ndarray, np.random.Generator]:
    """A machine whose speed wanders by some 8 %, as (rounds,) logarithms, and the source for each call's own noise."""
    random_source = np.random.default_rng(seed)
    return np.cumsum(random_source.normal(0, 0.02, rounds)) * 0.3, random_source


def synthetic(slower: float, seed: int, rounds: int = 128) -> bench.Comparison:
    """A comparison of a with b, b slower by `slower`, on a drifting machine with 3 % noise and rare hiccups."""
    wander, source = drifting(rounds, seed)

    def samples(factor: float) -> bench.Measurement:
        own = source.normal(0, 0.03, rounds) + (source.random(rounds) < 0.03) * source.exponential(0.7, rounds)
        return measurement([int(2e6 * factor * math.exp(w)) for w in wander + own])

    return bench.Comparison(measurements={"a": samples(1.0), "b": samples(1 + slower)}, twin=samples(1.0))


# ---- statistics ------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=80), st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99, 1.0]))
def test_percentiles_are_those_of_numpy(samples: list[int], share: float) -> None:
    assert bench.percentile(samples, share) == pytest.approx(float(np.quantile(samples, share)))


def exact_discarded(count: int, share: Fraction) -> int | None:
    """The same rule in exact fractions, straight from its definition."""
    cumulated, most = Fraction(0), None
    for over in range(count + 1):
        cumulated += math.comb(count, over) * (1 - share) ** over * share ** (count - over)
        if cumulated > Fraction(1, 100):
            break
        most = over
    return most - 1 if most else None


@pytest.mark.parametrize("count", [1, 10, 63, 64, 65, 100, 128, 500, 1024])
@pytest.mark.parametrize("share", [Fraction(9, 10), Fraction(99, 100), Fraction(1, 2)])
def test_samples_left_out_of_a_tail_follow_the_binomial_law(count: int, share: Fraction) -> None:
    assert max_discarded_samples(count, float(share)) == exact_discarded(count, share)


def test_tails_need_as_many_samples_as_mlperf_says() -> None:
    assert max_discarded_samples(63, 0.90) is None
    assert max_discarded_samples(64, 0.90) == 0
    assert max_discarded_samples(661, 0.99) is None
    assert max_discarded_samples(662, 0.99) == 0
    assert max_discarded_samples(1024, 0.90) == 79  # 1 - 80 / 1024: the 92.2th percentile is what 99 % sure costs


def test_a_sure_percentile_is_sure() -> None:
    source = random.Random(1)
    trials = [[source.random() for _ in range(150)] for _ in range(1500)]
    assert sum(percentile_confidence_bound(trial, 0.9) < 0.9 for trial in trials) <= 0.015 * len(trials)
    assert sum(percentile_confidence_bound(trial, 0.1) > 0.1 for trial in trials) <= 0.015 * len(trials)


def test_an_interval_is_the_bootstrap_written_out() -> None:
    """Without neighbours to keep together (independent ratios), against a loop of single draws."""
    ratios = [0.9, 1.0, 1.05, 1.1, 1.3, 1.31, 1.5]
    source = random.Random(3)
    medians = sorted(sorted(source.choices(ratios, k=7))[3] for _ in range(4000))
    value, low, high = pooled_ratio_interval(ratios, seed=0)
    assert value == pytest.approx(1.1)
    assert (low, high) == pytest.approx((medians[100], medians[3900]))


def test_what_slows_a_whole_round_cancels_in_its_pair() -> None:
    wander, _ = drifting(200, seed=5)
    a = [1e6 * math.exp(10 * w) for w in wander]
    value, low, high = paired_ratio_interval(a, [1.02 * each for each in a], seed=0)
    assert (value, low, high) == pytest.approx((1.02, 1.02, 1.02))


# ---- comparison ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_a_planted_slowdown_of_five_percent_is_found(seed: int) -> None:
    ratio = synthetic(0.05, seed).ratio("b")
    assert ratio.verdict == "slower"
    assert ratio.low < 1.05 < ratio.high or abs(ratio.value - 1.05) < 0.01


def test_the_same_against_itself_is_no_difference() -> None:
    verdicts = Counter(synthetic(0.0, seed).ratio("b").verdict for seed in range(100))
    assert verdicts["no difference"] >= 95


def test_a_difference_inside_the_noise_floor_is_none() -> None:
    clear = {"value": 1.01, "low": 1.005, "high": 1.015}
    assert bench.Ratio(**clear).verdict == "slower"
    assert bench.Ratio(**clear, floor=0.02).verdict == "no difference"
    assert bench.Ratio(value=0.97, low=0.96, high=0.98, floor=0.02).verdict == "faster"
    assert bench.Ratio(value=0.97, low=0.90, high=1.01).verdict == "no difference"


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_orders_are_balanced_and_not_always_the_same(count: int) -> None:
    drawn = list(itertools.islice(random_orders(count, random.Random(7)), 40 * count))
    for block in range(0, len(drawn), count):
        for place in range(count):
            assert sorted(order[place] for order in drawn[block : block + count]) == list(range(count))
    assert drawn == list(itertools.islice(random_orders(count, random.Random(7)), 40 * count))
    if count > 1:
        firsts = [order[0] for order in drawn[::count]]
        assert len(set(firsts)) == count
        assert drawn != list(itertools.islice(random_orders(count, random.Random(8)), 40 * count))


def test_a_comparison_interleaves_its_calls() -> None:
    clock, seen = FakeClock(), []

    def noted(name: str) -> Callable[[], None]:
        return clock.call(lambda: seen.append(name) or 5000)

    procedure = replace(QUICK, lead_calls=0)
    comparison = bench.compare({"a": noted("a"), "b": noted("b")}, procedure, instruments=instruments(clock))
    rounds = [seen[start : start + 3] for start in range(0, len(seen), 3)]
    assert all(sorted(each) == ["a", "a", "b"] for each in rounds)  # the baseline twice: once as its own twin
    places = Counter(each.index("b") for each in rounds[3:])
    assert max(places.values()) - min(places.values()) <= 1
    assert len({tuple(each) for each in rounds[3:9]}) > 1
    assert list(comparison.measurements) == ["a", "b"]
    assert [len(each.samples_ns) for each in comparison.measurements.values()] == [64, 64]


@pytest.mark.parametrize(("lead_calls", "slower"), [(0, 2.0), (1, 1.0)])
def test_what_others_leave_in_the_caches_is_not_timed(lead_calls: int, slower: float) -> None:
    """A call takes 2 ms after another's and 1 ms after its own, as in a stream: so it does beside five others."""
    clock, last = FakeClock(), [""]

    def cached(name: str) -> Callable[[], None]:
        def cost() -> int:
            before, last[0] = last[0], name
            return 1_000_000 if before == name else 2_000_000

        return clock.call(cost)

    procedure = replace(QUICK, lead_calls=lead_calls)
    result = bench.compare({name: cached(name) for name in "abcdef"}, procedure, instruments=instruments(clock))
    alone = bench.measure(cached("a"), procedure, instruments=instruments(clock))
    assert result.measurements["f"].median_ns / alone.median_ns == pytest.approx(slower, rel=1e-3)


def test_rows_from_before_lead_calls_had_none() -> None:
    plain = bench.Procedure().to_dict()
    assert bench.Procedure.from_dict(plain) == bench.Procedure()
    del plain["lead_calls"]
    assert bench.Procedure.from_dict(plain).lead_calls == 0


def test_a_drifting_machine_does_not_fool_a_comparison() -> None:
    """The machine halves its speed on the way: one block after the other would call b much slower."""
    clock = FakeClock()
    work = clock.call(lambda: 100_000 * (1 + clock.read / 3e7))
    result = bench.compare({"a": work, "b": work}, QUICK, instruments=instruments(clock))
    a, b = (result.measurements[name].samples_ns for name in "ab")
    assert np.median(b[32:]) / np.median(a[:32]) > 1.2
    assert result.ratio("b").verdict == "no difference"


def test_planting_makes_a_call_slower_by_its_share() -> None:
    clock = FakeClock(step=20)
    work = clock.call(lambda: 1_000_000)
    result = bench.compare(
        {"plain": work, "planted": bench.with_injected_slowdown(work, 0.05, clock)},
        QUICK,
        instruments=instruments(clock),
    )
    assert result.ratio("planted").value == pytest.approx(1.05, abs=1e-4)
    assert result.sentences() == ["planted is 5.0 % (95 % CI 5.0-5.0 %) slower than plain."]


def test_the_self_test_gives_the_noise_floor() -> None:
    clock, source = FakeClock(), random.Random(0)
    ratio = bench.measure_noise_floor(clock.call(lambda: 1e6 * (1 + 0.02 * source.random())), QUICK, instruments(clock))
    assert ratio.verdict == "no difference"
    assert 0 < ratio.floor < 0.01
    assert ratio.floor == pytest.approx(max(ratio.high, 1 / ratio.low) - 1)


def test_pooling_takes_the_process_as_the_unit() -> None:
    processes = [synthetic(0.05, seed, rounds=64) for seed in range(8)]
    ratios = [each.ratio("b").value for each in processes]
    pooled = bench.pool_ratios(processes, "b")
    assert pooled.value == pytest.approx(math.exp(np.median(np.log(ratios))))
    assert min(ratios) <= pooled.low <= pooled.value <= pooled.high <= max(ratios)
    with pytest.raises(BadArgument, match="5 comparisons"):
        bench.pool_ratios(processes[:4], "b")


@pytest.mark.parametrize(
    ("value", "low", "high", "floor", "words"),
    [
        (1 / 2.9, 1 / 3.0, 1 / 2.8, 0.01, "fused is 2.9x (95 % CI 2.8-3) faster than unfused."),
        (2.9, 2.8, 3.0, 0.01, "fused is 2.9x (95 % CI 2.8-3) slower than unfused."),
        (0.95, 0.94, 0.96, 0.01, "fused is 5.0 % (95 % CI 4.0-6.0 %) faster than unfused."),
        (1.004, 0.99, 1.02, 0.01, "No difference between fused and unfused: +0.4 % (95 % CI -1.0 % to +2.0 %) "),
    ],
)
def test_a_ratio_in_words(value: float, low: float, high: float, floor: float, words: str) -> None:
    said = bench.Ratio(value=value, low=low, high=high, floor=floor).describe("fused", "unfused")
    assert said.startswith(words)


@pytest.mark.parametrize(
    ("slower", "noise", "said"),
    [
        (8000, {"others": 2.0}, "b is 8x (95 % CI 8-8) slower than a on a noisy machine, which may have changed this "
         "by a factor of 1.5 at the most."),
        (125, {"others": 2.0}, "b is 8x (95 % CI 8-8) faster than a on a noisy machine, which may have changed this "
         "by a factor of 1.5 at the most."),
        (1400, {"others": 2.0}, "No verdict on b against a: +40.0 % (95 % CI +40.0 % to +40.0 %) was measured on a "
         "noisy machine, where times may be off by a factor of 1.5; measure again when it is idle."),
        (1400, {"steal": 0.2}, "b is 1.4x (95 % CI 1.4-1.4) slower than a on a noisy machine, which may have changed "
         "this by a factor of 1.25 at the most."),
        (1000, {"steal": 0.2}, "No verdict on b against a: +0.0 % (95 % CI +0.0 % to +0.0 %) was measured on a noisy "
         "machine, where times may be off by a factor of 1.25; measure again when it is idle."),
        (1400, {"others": 0.5}, "b is 1.4x (95 % CI 1.4-1.4) slower than a."),
        (1000, {}, "No difference between b and a: +0.0 % (95 % CI +0.0 % to +0.0 %) lies within the noise."),
    ],
)  # fmt: skip
def test_a_verdict_is_withheld_only_where_the_noise_could_change_it(
    slower: int, noise: dict[str, float], said: str
) -> None:
    a, b, twin = (measurement([each] * 64, bench.TimingNoise(**noise)) for each in (1000, slower, 1000))
    assert bench.Comparison(measurements={"a": a, "b": b}, twin=twin).sentences() == [said]


def test_samples_that_scatter_widen_what_noise_may_have_changed() -> None:
    """The slow tenth of one takes twice as long as its quick tenth, and the baseline differs from itself by 10 %."""
    a, b, twin = (measurement(each) for each in ([1000] * 64, [1000, 2000] * 32, [1100] * 64))
    ratio = bench.Comparison(measurements={"a": a, "b": b}, twin=twin).ratio("b")
    assert ratio.noise == pytest.approx(2.0 * 1.1)
    assert ratio.low / ratio.noise < 1 < ratio.low
    assert not ratio.is_robust_to_noise


@pytest.mark.parametrize(
    ("noise", "threads", "factor"),
    [
        ({}, 1, 1.0),
        ({"others": 4.0}, 1, 2.0),
        ({"load_before": 9.0, "others": 1.0}, 1, 1.25),  # the load is of earlier work where others' time is known
        ({"load_before": 2.0, "load_after": 4.0}, 1, 1.75),  # one of the four was this process
        ({"steal": 0.5}, 1, 2.0),
        ({"steal": 1.0}, 1, 1000.0),
        ({"mhz_before": 1000.0, "mhz_after": 1500.0}, 1, 1.5),
        ({}, 8, 2.0),
        ({"remarks": ("The phone was hot.",), "others": 2.0}, 1, 3.0),
    ],
)
def test_noise_slows_by_a_factor_at_the_most(noise: dict[str, object], threads: int, factor: float) -> None:
    assert bench.TimingNoise(**noise).max_slowdown(MACHINE, threads) == pytest.approx(factor)


def test_a_comparison_refuses_what_it_cannot_compare() -> None:
    with pytest.raises(BadArgument, match="two calls"):
        bench.compare({"a": lambda: None}, QUICK)
    with pytest.raises(BadArgument, match="subjects are named"):
        bench.compare({"a": lambda: None, "b": lambda: None}, QUICK, {"c": {}})
    with pytest.raises(BadArgument, match="16 samples"):
        bench.compare({"a": lambda: None, "b": lambda: None}, bench.Procedure(samples=15))
    with pytest.raises(BadArgument, match="no 'x'"):
        synthetic(0.0, 0, rounds=16).ratio("x")


# ---- one measurement -------------------------------------------------------------------------------------------------


def test_a_measurement_counts_what_the_clock_says() -> None:
    clock = FakeClock(step=10)
    durations = iter([90_000, 50_000, 50_000, *range(100_000, 100_064)])
    result = bench.measure(clock.call(lambda: next(durations)), QUICK, {"model": "m"}, instruments(clock))
    assert result.samples_ns == tuple(range(100_010, 100_074))  # one step of the clock between its two readings
    assert result.warmup_ns == (90_010, 50_010, 50_010)
    assert (result.resolution_ns, result.overhead_ns, result.calls_per_sample) == (10, 10, 1)
    assert result.median_ns == 100_041.5
    assert result.min_ns == 100_010
    assert result.p90_ns == 100_073  # of 64 samples, 99 % sure of nine in ten: the largest
    assert result.p10_ns == 100_010
    assert result.p99_ns is None
    assert result.spread == pytest.approx(0.8 * 63 / 100_041.5)
    assert result.verdict == "quiet"


def test_a_short_call_is_timed_back_to_back() -> None:
    clock = FakeClock(step=100)
    result = bench.measure(clock.call(lambda: 2_400), QUICK, instruments=instruments(clock))
    assert result.calls_per_sample == 40  # 40 calls of 2500 ns, as the clock sees them, are 1000 steps of 100 ns
    assert result.samples_ns[0] == 40 * 2_400 + 100
    assert result.median_ns == pytest.approx(2_402.5)
    assert result.p90_ns is None  # a mean of 40 calls has no tail


def test_warm_up_and_samples_go_on_for_their_time() -> None:
    clock, calls = FakeClock(), []
    work = clock.call(lambda: calls.append(1) or 1_000_000)
    procedure = bench.Procedure(warmup_calls=1, warmup_seconds=0.010, samples=2, min_seconds=0.030)
    result = bench.measure(work, procedure, instruments=instruments(clock))
    assert len(result.samples_ns) == 30
    assert len(calls) == 40


def test_an_error_of_the_call_passes_through() -> None:
    with pytest.raises(ZeroDivisionError):
        bench.measure(lambda: 1 / 0, QUICK, instruments=instruments(FakeClock()))


@pytest.mark.parametrize(
    "wrong",
    [
        {"samples": 0},
        {"samples": 1.5},
        {"samples": True},
        {"warmup_calls": 0},
        {"lead_calls": -1},
        {"threads": 0},
        {"seed": -1},
        {"warmup_seconds": -1.0},
        {"min_seconds": math.inf},
        {"min_seconds": math.nan},
        {"min_seconds": "1"},
    ],
)
def test_a_procedure_that_cannot_be_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(BadArgument, match=next(iter(wrong))):
        bench.Procedure(**wrong)


@pytest.mark.parametrize("wrong", [{"a": math.nan}, {"a": object()}, {"a": [{1: 2}]}, {"a": b"x"}])
def test_a_subject_unfit_for_json_is_refused_before_the_run(wrong: dict[str, object]) -> None:
    with pytest.raises(BadArgument, match="subject"):
        bench.measure(lambda: pytest.fail("it ran"), QUICK, wrong)


def test_samples_of_a_broken_clock_are_refused() -> None:
    for samples in ([], [5, 0], [5, -1], [1.5], [10**400]):
        with pytest.raises(BadData, match="clock"):
            measurement(samples)


# ---- noise -----------------------------------------------------------------------------------------------------------

STEADY = [1000] * 100


@pytest.mark.parametrize(
    ("noise", "samples", "reason"),
    [
        ({"load_before": 2.1}, STEADY, "busy before: load 2.10 on 4 cores"),
        ({"load_before": 3.1, "others": 0.0}, STEADY, "busy before: load 3.10"),
        ({"load_after": 3.1}, STEADY, "busy after: load 3.10"),
        ({"others": 1.1}, STEADY, "Other programs used 1.1 of 4 cores"),
        ({"steal": 0.011}, STEADY, "hypervisor took 1.1 %"),
        ({}, [1000, 1300] * 50, "scatter: their standard deviation is 10 %"),
        ({}, [1000] * 98 + [1500] * 2, "2.0 % of the samples took more than 1.5 times"),
        ({}, [1000] * 50 + [1060] * 50, "second half ran 6 % slower"),
        ({}, [1060] * 50 + [1000] * 50, "second half ran 6 % faster"),
    ],
)
def test_noise_has_a_reason(noise: dict[str, float], samples: list[int], reason: str) -> None:
    result = measurement(samples, bench.TimingNoise(**noise))
    assert result.verdict == "noisy"
    assert len(result.reasons) == 1
    assert reason in result.reasons[0]


@pytest.mark.parametrize(
    ("noise", "samples"),
    [
        ({"load_before": 2.0, "load_after": 3.0, "steal": 0.01, "others": 1.0, "switches": 10**6}, STEADY),
        ({"load_before": 2.9, "others": 0.1}, STEADY),  # most of the load is this process's own earlier work
        ({}, [1000] * 99 + [9000]),  # one hiccup in a hundred
        ({}, [1000, 1200] * 50),
    ],
)
def test_a_quiet_machine_is_called_quiet(noise: dict[str, float], samples: list[int]) -> None:
    assert measurement(samples, bench.TimingNoise(**noise)).reasons == ()


def test_more_threads_than_cores_are_noise() -> None:
    procedure = bench.Procedure(threads=8)
    assert measurement(STEADY, procedure=procedure).reasons == ("8 threads shared 4 cores.",)


def test_noise_is_the_difference_of_two_looks() -> None:
    before = bench.SystemCounters(load=1.0, switches=5, stolen_ticks=10, busy_ticks=100, ticks=1000, host_cores=4)
    after = bench.SystemCounters(
        load=2.0,
        switches=7,
        stolen_ticks=14,
        busy_ticks=300,
        ticks=1400,
        host_cores=4,
        own_ns=500_000_000,
        at_ns=1_000_000_000,
    )
    noise = bench.TimingNoise.from_counters(before, after)
    assert (noise.load_before, noise.load_after, noise.switches, noise.steal) == (1.0, 2.0, 2, 0.01)
    assert noise.others == pytest.approx(1.5)  # two of four cores were busy, half a core was this process
    assert bench.TimingNoise.from_counters(bench.SystemCounters(), bench.SystemCounters()) == bench.TimingNoise()


def test_noise_reaches_the_verdict_of_a_run() -> None:
    clock = FakeClock()
    busy = instruments(clock, bench.SystemCounters(load=3.5), bench.SystemCounters(load=3.6))
    assert bench.measure(clock.call(lambda: 10_000), QUICK, instruments=busy).verdict == "noisy"


# ---- the machine -----------------------------------------------------------------------------------------------------

X86 = """processor : 0
model name\t: Intel(R) Xeon(R) Platinum 8480C CPU @ 2.00GHz
flags\t\t: fpu avx2 fma avx512f avx512_vnni avx512_bf16 amx_tile
"""
ARM = """processor : 0
Features\t: fp asimd asimddp i8mm bf16 asimdhp
Hardware : Some Board
"""


def fake_root(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("--", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_a_machine_is_read_from_its_system(tmp_path: Path) -> None:
    files = {
        "proc/cpuinfo": X86,
        "proc/meminfo": "MemTotal:       16384 kB\n",
        "proc/loadavg": "0.50 0.40 0.30 1/100 999\n",
        "sys/fs/cgroup/cpu.max": "150000 100000\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance\n",
        "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "3800000\n",
    }
    machine = bench.Machine.detect(packages=("numpy", "no-such-package"), root=fake_root(tmp_path, **files))
    assert machine.chip == "Intel Xeon Platinum 8480C"
    assert machine.features == ("avx2", "fma", "avx512", "vnni", "bf16", "amx")
    assert (machine.memory_bytes, machine.load, machine.quota) == (16384 * 1024, 0.5, 1.5)
    assert (machine.governor, machine.max_mhz) == ("performance", 3800.0)
    assert dict(machine.versions) == {"numpy": np.__version__}
    assert machine.available_cores == min(1.5, machine.usable_cores)


def test_an_arm_machine_and_its_features(tmp_path: Path) -> None:
    machine = bench.Machine.detect(packages=(), root=fake_root(tmp_path, **{"proc/cpuinfo": ARM}))
    assert machine.chip == "Some Board"
    assert machine.features == ("bf16", "fp16", "neon", "dotprod", "i8mm")
    assert machine.quota is None


def test_a_limit_of_an_older_container(tmp_path: Path) -> None:
    legacy = {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}
    assert bench.Machine.detect((), fake_root(tmp_path / "a", **legacy)).quota == 2.0
    legacy["sys/fs/cgroup/cpu/cpu.cfs_quota_us"] = "-1"
    assert bench.Machine.detect((), fake_root(tmp_path / "b", **legacy)).quota is None


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept_for_the_next_allocation() -> None:
    """Sixteen times 64 MiB cost the pages of one; a user's own settings are left alone."""
    code = (
        "import resource, sys; from onefold.system_resources import keep_freed_memory\n"
        "kept = keep_freed_memory()\n"
        "for _ in range(16): bytes(bytearray(1 << 26))\n"
        "print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt)\n"
    )
    found = []
    for more in ({}, {"MALLOC_TOP_PAD_": "131072"}):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | more
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        found.append([int(each) for each in done.stdout.split()])
    pages = (1 << 26) // os.sysconf("SC_PAGESIZE")
    assert (found[0][0], found[1][0]) == (1, 0)
    assert found[0][1] < 8 * pages < 16 * pages < found[1][1]


def test_the_least_quota_of_the_groups_around_a_process_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container of two processors on a host of 64 would get 64 threads from libraries that see no quota."""
    group = "sys/fs/cgroup/kubepods/pod/box"
    files = {"proc/self/cgroup": "0::/kubepods/pod/box\n", f"{group}/cpu.max": "max 100000\n"}
    files |= {"sys/fs/cgroup/kubepods/pod/cpu.max": "250000 100000\n", "sys/fs/cgroup/kubepods/cpu.max": "max 100000"}
    root = fake_root(tmp_path, **files)
    monkeypatch.setattr("onefold.system_resources.num_usable_cpus", lambda: 64)
    assert system_resources.cpu_quota(root) == 2.5
    assert system_resources.available_threads(root) == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    with monkeypatch.context() as patch:
        patch.setattr("onefold.system_resources._read", lambda path: "50000 100000" if path.name == "cpu.max" else "")
        system_resources.limit_library_threads()
        assert os.environ["OMP_NUM_THREADS"] == "7"  # what a user says stands
        patch.delenv("OMP_NUM_THREADS")
        system_resources.limit_library_threads()
        assert os.environ.pop("OMP_NUM_THREADS") == "1"  # of half a processor


@pytest.mark.parametrize(
    ("said", "count"), [({}, "10000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_threads_that_wait_sleep_soon_unless_the_environment_says_otherwise(
    said: dict[str, str], count: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    system_resources.limit_library_threads()
    assert os.environ.get("GOMP_SPINCOUNT") == count


def test_a_slug_is_short_and_changes_with_the_machine_only() -> None:
    assert MACHINE.slug == "test-chip-9-4c-linux"
    busier = bench.Machine(**{**MACHINE.to_dict(), "features": (), "load": 9.0, "quota": 1.0, "system": "Linux 7"})
    assert busier.slug == MACHINE.slug
    odd = bench.Machine(chip="../../é\n" + "x" * 99, architecture="", cores=1, usable_cores=1)
    assert len(odd.slug) <= 60
    assert "/" not in odd.slug
    assert odd.slug.isascii()


def test_names_of_host_and_user_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.node", lambda: "host-of-somebody")
    monkeypatch.setattr("socket.gethostname", lambda: "host-of-somebody")
    monkeypatch.setenv("USER", "somebody-private")
    written = json.dumps(bench.Machine.detect().to_dict())
    assert "somebody" not in written
    assert bench.Machine.from_dict(json.loads(written)).to_dict() == json.loads(written)


# ---- on disk ---------------------------------------------------------------------------------------------------------


def some_results() -> list[bench.Measurement | bench.Comparison]:
    subject = {
        "model": "m\udcff <script>",
        "input_shape": [1, 3, 224, 224],
        "fused": True,
        "drift": 4e-7,
        "macs": 10**9,
    }
    single = measurement(
        range(1000, 1100), bench.TimingNoise(load_before=0.5, switches=3), subject=subject, warmup_ns=(9, 8)
    )
    return [single, synthetic(0.05, 1, rounds=32)]


def test_results_come_back_as_they_went(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.jsonl"
    single, comparison = some_results()
    bench.append_results(path, [single])
    bench.append_results(path, [comparison, single])
    back = bench.read_results(path)
    assert back == bench.Results(measurements=(single, single), comparisons=(comparison,))
    assert back.comparisons[0].ratio("b") == comparison.ratio("b")
    assert bench.read_measurements(path) == [single, single, *comparison.measurements.values()]
    kinds = [json.loads(line)["kind"] for line in path.read_text().splitlines()]
    assert kinds == ["measurement", "comparison", "measurement"]


def test_a_line_tells_its_figures_to_other_programs(tmp_path: Path) -> None:
    single, comparison = some_results()
    bench.append_results(tmp_path / "r.jsonl", [single, comparison])
    first, second = (json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines())
    assert first["summary"]["median_ns"] == single.median_ns == 1049.5
    assert second["summary"]["b"]["value"] == comparison.ratio("b").value
    assert second["summary"]["b"]["verdict"] == "slower"


def test_a_crash_at_any_byte_costs_one_line_at_most(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    single, _ = some_results()
    bench.append_results(path, [single, single])
    whole = path.read_bytes()
    start_of_last = whole.index(b"\n") + 1
    for cut in range(start_of_last + 1, len(whole) - 1, 97):
        path.write_bytes(whole[:cut])
        with pytest.warns(UserWarning, match=r"r\.jsonl, line 2: left out, it was cut off"):
            assert bench.read_measurements(path) == [single]
        bench.append_results(path, [single])
        assert path.read_bytes().startswith(whole[:cut])
        back = bench.read_results(path)
        assert back.measurements == (single, single)
        assert len(back.notes) == 1


def test_a_line_cut_off_at_its_very_end_is_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    single, _ = some_results()
    bench.append_results(path, [single])
    path.write_bytes(path.read_bytes()[:-1])
    bench.append_results(path, [single])
    assert bench.read_measurements(path) == [single, single]


def test_other_kinds_are_left_out_and_named(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    bench.append_results(path, some_results()[:1])
    with path.open("a") as file:
        file.write('{"kind": "dream"}\n[1]\n')
    notes = bench.read_results(path).notes
    assert [("line 2" in notes[0], "'dream'" in notes[0]), "line 3" in notes[1]] == [(True, True), True]


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line.pop("machine"),
        lambda line: line.update(samples_ns=["1"]),
        lambda line: line.update(samples_ns=[]),
        lambda line: line.update(procedure={"samples": -5}),
        lambda line: line["machine"].update(cores="many"),
        lambda line: line["machine"].update(memory_bytes=1e999),
        lambda line: line["noise"].update(load_before=[]),
        lambda line: line.update(subject=7),
    ],
)
def test_a_damaged_result_is_refused_by_line(tmp_path: Path, damage: Callable[[dict], object]) -> None:
    path = tmp_path / "r.jsonl"
    bench.append_results(path, some_results()[:1])
    line = json.loads(path.read_text())
    damage(line)
    path.write_text(json.dumps(line).replace("Infinity", "1e999") + "\n")
    with pytest.raises(BadData, match="line 1"):
        bench.read_results(path)


def test_a_line_whose_figures_were_changed_is_left_out_and_said(tmp_path: Path) -> None:
    path, (single, _) = tmp_path / "r.jsonl", some_results()
    bench.append_results(path, [single, single])
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n{second.replace('[1000, 1001', '[1000, 1002')}\n")
    found = bench.read_results(path)
    assert found.measurements == (single,)
    assert "r.jsonl, line 2: left out, it is damaged: its checksum is not that" in found.notes[0]
    older = {name: value for name, value in json.loads(first).items() if name != "checksum"}
    path.write_text(f"{first}\n{json.dumps(older)}\n")
    assert bench.read_results(path).measurements == (single, single)
    assert bench.read_results(path).notes[0].startswith("r.jsonl: of 2 results 1 have no checksum")


@pytest.mark.parametrize("text", ["not json at all\n", '{"kind": "epoch"}\n', "[" * 100_000, "\x00\xff\n"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(text)
    with pytest.raises(BadData, match="holds no results"):
        bench.read_results(path)


def test_missing_and_unwritable_files_are_said_so(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="cannot read results"):
        bench.read_results(tmp_path / "none.jsonl")
    with pytest.raises(BadData, match="cannot read results"):
        bench.read_results(tmp_path)
    with pytest.raises(NotWritable, match="cannot add to"):
        bench.append_results(tmp_path, some_results()[:1])
    assert bench.read_results(_touched(tmp_path / "empty.jsonl")) == bench.Results()


def _touched(path: Path) -> Path:
    path.touch()
    return path


def test_the_room_imports_neither_torch_nor_a_runtime() -> None:
    code = "import sys, onefold.bench; print([n for n in ('torch', 'onnxruntime', 'openvino') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
