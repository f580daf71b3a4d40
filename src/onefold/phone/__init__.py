"""Measuring on an Android phone, by adb and the vendors' own programs; it never imports torch.

adb.py        every call of adb, with its mistakes as sentences
facts.py      what a phone is, and how it fares: heat, battery, screen
programs.py   the vendors' benchmark programs: how they are called, and what their output says
rounds.py     artifacts and programs on the phone, run in interleaved rounds
"""

from onefold.phone.adb import Adb as Adb
from onefold.phone.adb import connect as connect
from onefold.phone.benchmark import Load as Load
from onefold.phone.benchmark import Plan as Plan
from onefold.phone.benchmark import measure_on as measure_on
from onefold.phone.device import Condition as Condition
from onefold.phone.device import Phone as Phone
from onefold.phone.device import look as look
from onefold.phone.programs import PROGRAMS as PROGRAMS
from onefold.phone.programs import Program as Program
from onefold.phone.programs import program_of as program_of
