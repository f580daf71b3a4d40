"""Folding as an algebra: linear layers in series and in parallel, and the one convolution that they are.

It stands on torch and on `onefold.cpp_extension` alone, which compiles the kernels of the training routes.
"""

from onefold.reparam.accelerate import accelerate as accelerate
from onefold.reparam.drift import drift as drift
from onefold.reparam.expand import expand as expand
from onefold.reparam.expand import recalibrate_norms_ as recalibrate_norms_
from onefold.reparam.folding_rules import Chain as Chain
from onefold.reparam.folding_rules import Route as Route
from onefold.reparam.folding_rules import Scale as Scale
from onefold.reparam.folding_rules import Sum as Sum
from onefold.reparam.folding_rules import conv_act as conv_act
from onefold.reparam.folding_rules import fold as fold
from onefold.reparam.folding_rules import is_linear as is_linear
from onefold.reparam.folding_rules import per_branch as per_branch
from onefold.reparam.fuse import UnfoldedWarning as UnfoldedWarning
from onefold.reparam.fuse import fuse as fuse
from onefold.reparam.fuse import unfused_norms as unfused_norms
from onefold.reparam.routes import folded as folded
from onefold.reparam.routes import mixed as mixed
from onefold.reparam.routes import moments as moments
from onefold.reparam.routes import quickest as quickest
from onefold.reparam.routes import set_route_ as set_route_
from onefold.reparam.stencil import Stencil as Stencil
