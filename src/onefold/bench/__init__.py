"""A stopwatch that a skeptic can use: it knows calls and clocks, nothing of networks or runtimes.

measurement.py   Procedure, Measurement: the values, with every raw sample
clock.py         measure: warm up, time, keep everything
comparison.py    compare, aa, self_test, planted, pooled: interleaved A/B with an interval and a noise floor
machine.py       Machine: what this machine is
affinity.py      which processors this process may use
peaks.py (.cpp)  what the machine can do at the most, measured
roofline.py      Roofline, Work, Bound: the least time that so much work can take on it
cold.py          Cold: the first call and the peak of memory, in a fresh process
energy.py        Energy: joules a call, where the processor's counters can be read
noise.py         what else it was doing, and when that is too much
statistics.py    percentiles, a tail with a confidence, paired intervals
ledger.py        append, read, read_all: results as JSON lines
"""

from onefold.bench.affinity import pinned as pinned
from onefold.bench.clock import Instruments as Instruments
from onefold.bench.clock import measure as measure
from onefold.bench.cold_start import Cold as Cold
from onefold.bench.cold_start import measure_cold as measure_cold
from onefold.bench.compare import Comparison as Comparison
from onefold.bench.compare import Ratio as Ratio
from onefold.bench.compare import aa as aa
from onefold.bench.compare import compare as compare
from onefold.bench.compare import planted as planted
from onefold.bench.compare import pooled as pooled
from onefold.bench.compare import self_test as self_test
from onefold.bench.energy import Energy as Energy
from onefold.bench.energy import measure_energy as measure_energy
from onefold.bench.machine import Machine as Machine
from onefold.bench.measurement import Measurement as Measurement
from onefold.bench.measurement import Procedure as Procedure
from onefold.bench.noise import Noise as Noise
from onefold.bench.noise import Vitals as Vitals
from onefold.bench.peaks import measure_roofline as measure_roofline
from onefold.bench.results import Results as Results
from onefold.bench.results import append as append
from onefold.bench.results import read as read
from onefold.bench.results import read_all as read_all
from onefold.bench.roofline import Bound as Bound
from onefold.bench.roofline import Limit as Limit
from onefold.bench.roofline import Roofline as Roofline
from onefold.bench.roofline import Work as Work
from onefold.bench.statistics import percentile as percentile
