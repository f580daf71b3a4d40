"""The main path, one verb a stage: each reads files and writes files, and can be run alone, again, elsewhere.

recipe -> `start_run` -> runs/<name>/ -> `fuse` -> fused.safetensors -> `export` -> artifacts/ -> `bench` -> results/
-> `write_page` -> report.html; and on any of them `evaluate` and `predict`. `demo` is all of it.
"""

from onefold.commands.bench import Bench as Bench
from onefold.commands.bench import bench as bench
from onefold.commands.bench import note_accuracy as note_accuracy
from onefold.commands.demo import demo as demo
from onefold.commands.deploy import Deployed as Deployed
from onefold.commands.deploy import Deployment as Deployment
from onefold.commands.deploy import Verdict as Verdict
from onefold.commands.deploy import deploy as deploy
from onefold.commands.evaluate import Exam as Exam
from onefold.commands.evaluate import Scored as Scored
from onefold.commands.evaluate import evaluate as evaluate
from onefold.commands.evaluate import examine as examine
from onefold.commands.evaluate import open_exam as open_exam
from onefold.commands.fuse import Fused as Fused
from onefold.commands.fuse import Order as Order
from onefold.commands.fuse import export as export
from onefold.commands.fuse import fuse as fuse
from onefold.commands.limits import measured_limits as measured_limits
from onefold.commands.models import Row as Row
from onefold.commands.models import table as table
from onefold.commands.open import Network as Network
from onefold.commands.open import Predictor as Predictor
from onefold.commands.open import named as named
from onefold.commands.open import open_network as open_network
from onefold.commands.open import open_predictor as open_predictor
from onefold.commands.open import validation_images as validation_images
from onefold.commands.phones import PhoneBench as PhoneBench
from onefold.commands.phones import bench_on_phone as bench_on_phone
from onefold.commands.predict import Prediction as Prediction
from onefold.commands.predict import predict as predict
from onefold.commands.quantizing import Calibration as Calibration
from onefold.commands.report import write_page as write_page
from onefold.commands.train import Outcome as Outcome
from onefold.commands.train import resume_run as resume_run
from onefold.commands.train import start_run as start_run
from onefold.commands.watching import Watch as Watch
