"""Latencies: raw samples, interleaved comparisons, noise, the machine and its limits. No torch, no runtime."""

from onefold.bench.cold_start import ColdStart as ColdStart
from onefold.bench.cold_start import measure_cold_start as measure_cold_start
from onefold.bench.compare import Comparison as Comparison
from onefold.bench.compare import Ratio as Ratio
from onefold.bench.compare import aa as aa
from onefold.bench.compare import compare as compare
from onefold.bench.compare import pooled as pooled
from onefold.bench.compare import self_test as self_test
from onefold.bench.compare import slowed_down as slowed_down
from onefold.bench.machine import Machine as Machine
from onefold.bench.measurement import Instruments as Instruments
from onefold.bench.measurement import Measurement as Measurement
from onefold.bench.measurement import Procedure as Procedure
from onefold.bench.measurement import measure as measure
from onefold.bench.results import Results as Results
from onefold.bench.results import append as append
from onefold.bench.results import read as read
from onefold.bench.results import read_all as read_all
from onefold.bench.roofline import Bound as Bound
from onefold.bench.roofline import Limit as Limit
from onefold.bench.roofline import Roofline as Roofline
from onefold.bench.roofline import Work as Work
from onefold.bench.roofline import measure_roofline as measure_roofline
from onefold.bench.timing_noise import Noise as Noise
from onefold.bench.timing_noise import Vitals as Vitals
from onefold.bench.timing_noise import percentile as percentile
