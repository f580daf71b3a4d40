"""An Android phone over adb, measured by the vendors' own benchmark programs. Never imports torch."""

from onefold.phone.adb import Adb as Adb
from onefold.phone.adb import connect as connect
from onefold.phone.benchmark import PROGRAMS as PROGRAMS
from onefold.phone.benchmark import Load as Load
from onefold.phone.benchmark import Plan as Plan
from onefold.phone.benchmark import Program as Program
from onefold.phone.benchmark import measure_on as measure_on
from onefold.phone.benchmark import program_of as program_of
from onefold.phone.device import Condition as Condition
from onefold.phone.device import PhoneInfo as PhoneInfo
from onefold.phone.device import look as look
