"""Networks of 8 bits, made on the folded kernel.

graph.py        a fused network as a graph: its layers, and the points between them
grid.py         grids of 8-bit numbers, and how a range is chosen
equalize.py     the ranges of channels made alike
rounding.py     kernels rounded by the moments of their inputs
calibrate.py    one walk through the network that chooses every grid, kernel and bias
network.py      the network of 8 bits, in the form that runtimes read
whole.py        the same, computed on whole numbers as devices do: the simulation
settled.py      grids as a few numbers beside the weights, and the network of 8 bits made of both
aware.py        training as the network of 8 bits
sensitivity.py  what each layer alone costs
choosing.py     the method by measured answers; layers spared from it
method.py       how, as a value; what each layer lost
quantize.py     the verb
"""

from onefold.quantize.integer import WholeNumbers as WholeNumbers
from onefold.quantize.method import PLAIN as PLAIN
from onefold.quantize.method import LayerReport as LayerReport
from onefold.quantize.method import Method as Method
from onefold.quantize.qat import calibrated as calibrated
from onefold.quantize.qat import is_aware as is_aware
from onefold.quantize.qat import make_aware_ as make_aware_
from onefold.quantize.qat import plain_ as plain_
from onefold.quantize.quantize import Quantized as Quantized
from onefold.quantize.quantize import quantize as quantize
from onefold.quantize.search import choose as choose
from onefold.quantize.search import spared as spared
from onefold.quantize.settled import Grids as Grids
from onefold.quantize.settled import ship as ship
