"""An Android phone over adb, measured by the vendors' own benchmark programs. Never imports torch."""

from onefold.phone.adb import Adb as Adb
from onefold.phone.adb import connect as connect
from onefold.phone.benchmark import PhoneArtifact as PhoneArtifact
from onefold.phone.benchmark import PhoneBenchPlan as PhoneBenchPlan
from onefold.phone.benchmark import benchmark_artifacts as benchmark_artifacts
from onefold.phone.device import PhoneCondition as PhoneCondition
from onefold.phone.device import PhoneInfo as PhoneInfo
from onefold.phone.device import read_phone_info as read_phone_info
from onefold.phone.programs import PROGRAMS as PROGRAMS
from onefold.phone.programs import BenchmarkProgram as BenchmarkProgram
from onefold.phone.programs import find_program as find_program
