"""Latencies: raw samples, interleaved comparisons, noise, the machine and its limits. No torch, no runtime."""

from onefold.bench.cold_start import ColdStart as ColdStart
from onefold.bench.cold_start import measure_cold_start as measure_cold_start
from onefold.bench.compare import Comparison as Comparison
from onefold.bench.compare import Ratio as Ratio
from onefold.bench.compare import compare as compare
from onefold.bench.compare import compare_with_itself as compare_with_itself
from onefold.bench.compare import measure_noise_floor as measure_noise_floor
from onefold.bench.compare import pool_ratios as pool_ratios
from onefold.bench.compare import with_injected_slowdown as with_injected_slowdown
from onefold.bench.machine import Machine as Machine
from onefold.bench.measurement import Instruments as Instruments
from onefold.bench.measurement import Measurement as Measurement
from onefold.bench.measurement import Procedure as Procedure
from onefold.bench.measurement import measure as measure
from onefold.bench.results import Results as Results
from onefold.bench.results import append_results as append_results
from onefold.bench.results import read_measurements as read_measurements
from onefold.bench.results import read_results as read_results
from onefold.bench.roofline import LatencyBound as LatencyBound
from onefold.bench.roofline import PeakRate as PeakRate
from onefold.bench.roofline import Roofline as Roofline
from onefold.bench.roofline import Workload as Workload
from onefold.bench.roofline import measure_roofline as measure_roofline
from onefold.bench.timing_noise import SystemCounters as SystemCounters
from onefold.bench.timing_noise import TimingNoise as TimingNoise
from onefold.bench.timing_noise import percentile as percentile
