"""Training: a Plan, batches and a network in; a run folder with checkpoints, a log and the best weights out."""

from onefold.train.checkpoint import Checkpoint as Checkpoint
from onefold.train.checkpoint import Position as Position
from onefold.train.distributed import World as World
from onefold.train.distributed import start_world as start_world
from onefold.train.evaluate import Accuracy as Accuracy
from onefold.train.evaluate import accuracy as accuracy
from onefold.train.folder import RunFolder as RunFolder
from onefold.train.loop import Batches as Batches
from onefold.train.loop import Run as Run
from onefold.train.loop import train as train
from onefold.train.optim import decay_groups as decay_groups
from onefold.train.optim import learning_rate as learning_rate
from onefold.train.optim import weight_decay as weight_decay
from onefold.train.plan import SGD as SGD
from onefold.train.plan import AdamW as AdamW
from onefold.train.plan import Cosine as Cosine
from onefold.train.plan import Ema as Ema
from onefold.train.plan import Exponential as Exponential
from onefold.train.plan import Plan as Plan
from onefold.train.plan import RMSprop as RMSprop
from onefold.train.plan import WeightDecay as WeightDecay
from onefold.train.progress import Progress as Progress
from onefold.train.randomness import seed_everything as seed_everything
from onefold.train.values import Epochs as Epochs
from onefold.train.values import Steps as Steps
