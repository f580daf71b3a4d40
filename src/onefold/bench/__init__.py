"""A stopwatch that a skeptic can use: it knows calls and clocks, nothing of networks or runtimes.

measurement.py   Procedure, Measurement: the values, with every raw sample
clock.py         measure: warm up, time, keep everything
comparison.py    compare, aa, planted, pooled: interleaved A/B with an interval and a noise floor
machine.py       Machine: what this machine is
noise.py         what else it was doing, and when that is too much
statistics.py    percentiles, a tail with a confidence, paired intervals
ledger.py        append, read, read_all: results as JSON lines
"""

from onefold.bench.clock import Instruments as Instruments
from onefold.bench.clock import measure as measure
from onefold.bench.comparison import Comparison as Comparison
from onefold.bench.comparison import Ratio as Ratio
from onefold.bench.comparison import aa as aa
from onefold.bench.comparison import compare as compare
from onefold.bench.comparison import planted as planted
from onefold.bench.comparison import pooled as pooled
from onefold.bench.ledger import Results as Results
from onefold.bench.ledger import append as append
from onefold.bench.ledger import read as read
from onefold.bench.ledger import read_all as read_all
from onefold.bench.machine import Machine as Machine
from onefold.bench.measurement import Measurement as Measurement
from onefold.bench.measurement import Procedure as Procedure
from onefold.bench.noise import Noise as Noise
from onefold.bench.noise import Vitals as Vitals
from onefold.bench.statistics import percentile as percentile
