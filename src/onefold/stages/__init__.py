"""The main path, one verb a stage: each reads files and writes files, and can be run alone, again, elsewhere.

recipe -> `start_run` -> runs/<name>/ -> `fuse` -> fused.safetensors -> `export` -> artifacts/ -> `bench` -> results/
-> `write_page` -> report.html; and on any of them `evaluate` and `predict`. `demo` is all of it.
"""

from onefold.stages.answers import Prediction as Prediction
from onefold.stages.answers import evaluate as evaluate
from onefold.stages.answers import predict as predict
from onefold.stages.demo import demo as demo
from onefold.stages.deploying import Deployed as Deployed
from onefold.stages.deploying import Deployment as Deployment
from onefold.stages.deploying import Verdict as Verdict
from onefold.stages.deploying import deploy as deploy
from onefold.stages.examining import Exam as Exam
from onefold.stages.examining import Scored as Scored
from onefold.stages.examining import examine as examine
from onefold.stages.examining import open_exam as open_exam
from onefold.stages.folding import Fused as Fused
from onefold.stages.folding import Order as Order
from onefold.stages.folding import export as export
from onefold.stages.folding import fuse as fuse
from onefold.stages.limits import measured_limits as measured_limits
from onefold.stages.listing import Row as Row
from onefold.stages.listing import table as table
from onefold.stages.measuring import Bench as Bench
from onefold.stages.measuring import bench as bench
from onefold.stages.measuring import note_accuracy as note_accuracy
from onefold.stages.network import Network as Network
from onefold.stages.network import Predictor as Predictor
from onefold.stages.network import named as named
from onefold.stages.network import open_network as open_network
from onefold.stages.network import open_predictor as open_predictor
from onefold.stages.page import write_page as write_page
from onefold.stages.phones import PhoneBench as PhoneBench
from onefold.stages.phones import bench_on_phone as bench_on_phone
from onefold.stages.quantizing import Calibration as Calibration
from onefold.stages.training import Outcome as Outcome
from onefold.stages.training import resume_run as resume_run
from onefold.stages.training import start_run as start_run
from onefold.stages.training import validation_images as validation_images
from onefold.stages.watching import Watch as Watch
