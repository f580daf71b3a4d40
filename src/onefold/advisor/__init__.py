"""The advisor: rules that find why a network is slow in a runtime, and trials that tell whether a remedy helps."""

from onefold.advisor.onnx_graph import OnnxGraph as OnnxGraph
from onefold.advisor.rule import Case as Case
from onefold.advisor.rule import NetworkForms as NetworkForms
from onefold.advisor.rule import Remedy as Remedy
from onefold.advisor.rule import Rule as Rule
from onefold.advisor.rules import RULES as RULES
from onefold.advisor.rules import select_rules as select_rules
from onefold.advisor.trials import Advice as Advice
from onefold.advisor.trials import AnswerChange as AnswerChange
from onefold.advisor.trials import Combination as Combination
from onefold.advisor.trials import Trial as Trial
from onefold.advisor.trials import TrialBench as TrialBench
from onefold.advisor.trials import advise_on as advise_on
from onefold.advisor.variant import Variant as Variant
