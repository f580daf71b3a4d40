"""A phone over adb, with a stand-in for both: what is measured, what is recorded, and every fault with its sentence."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onefold.bench import Comparison, read_results
from onefold.cli import main
from onefold.commands.phone import PhoneBenchOptions, bench_on_phone
from onefold.errors import DeviceFailed, OnefoldError
from onefold.phone import PROGRAMS, Adb, PhoneBenchPlan, read_phone_info
from onefold.phone.device import PhoneCondition
from onefold.phone.programs import ProgramCall
from onefold.runtimes.artifact import MANIFEST_FILE, REFERENCE_FILE, Artifact, Parity, hash_files, render_manifest
from onefold.runtimes.reference_logits import ReferenceLogits, make_reference_images, write_reference

ROOT = Path(__file__).resolve().parents[1]
SERIAL = "0A121FDD4003XY"
SHAPE, CLASSES = (3, 8, 6), 3
QUICK = ("--rounds", "2", "--runs", "4", "--warmup", "2", "--rest", "0")
PAIRED = ("--rounds", "5", *QUICK[2:])
FINE = {
    "devices": {SERIAL: "device"},
    "heats": [0],
    "level": 83,
    "status": 3,
    "temperature": 281,
    "wakefulness": "Awake",
    "low_power": 0,
    "free_kib": 4_000_000,
}


class FakePhone:
    """The stand-in, on PATH as `adb`."""

    def __init__(self, home: Path) -> None:
        self.home = home
        (home / "root").mkdir(parents=True)
        (home / "answers").mkdir()
        (home / "calls.jsonl").touch()
        (home / "log.txt").touch()
        (home / "bin").mkdir()
        adb = home / "bin" / "adb"
        start = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import fake_adb; fake_adb.main()"
        adb.write_text(f"#!{sys.executable} -IS\n{start}\n")  # imported, so that it is compiled once
        adb.chmod(0o755)
        self.behave()

    def behave(self, **changes: object) -> None:
        (self.home / "behaviour.json").write_text(json.dumps(FINE | changes))

    def install(self, *names: str) -> None:
        folder = self.home / "root/data/local/tmp/onefold"
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            (folder / name).touch()

    def asked(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.home / "calls.jsonl").read_text().splitlines()]

    def started(self, program: str) -> list[list[str]]:
        """The command lines of a program's starts, proofs left out."""
        lines = [shlex.split(call[-1]) for call in self.asked() if call[2:3] == ["shell"] and program in call[-1]]
        return [line for line in lines if line[0] == "env" and not any("output_file" in word for word in line)]


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePhone:
    fake = FakePhone(tmp_path / "phone")
    monkeypatch.setenv("PATH", str(fake.home / "bin"), prepend=":")
    monkeypatch.setenv("FAKE_PHONE", str(fake.home))
    monkeypatch.delenv("ANDROID_SERIAL", raising=False)
    monkeypatch.chdir(tmp_path)
    fake.install(*(program.name for program in PROGRAMS.values()))
    return fake


def artifact(phone: FakePhone, name: str, runtime: str = "litert", ms: int = 10, precision: str = "fp32") -> Path:
    """An artifact whose model says, by its first byte, how long one image takes; the phone knows its right answer."""
    folder = Path(name)
    folder.mkdir()
    file = {"litert": "model.tflite", "executorch": "model.pte", "onnx": "model.onnx"}[runtime]
    (folder / file).write_bytes(bytes([ms]) + name.encode())
    images = make_reference_images(SHAPE, seed=ms)
    logits = np.random.default_rng(ms).standard_normal((2, CLASSES), dtype=np.float32)
    write_reference(folder / REFERENCE_FILE, ReferenceLogits(images=images, logits=logits))
    made = Artifact(
        folder=folder,
        runtime=runtime,
        precision=precision,
        model=name,
        fused=True,
        drift=1e-7,
        input_shape=SHAPE,
        num_classes=CLASSES,
        dynamic_batch=True,
        classes=None,
        preprocessing={},
        parity=Parity(difference=1e-6, top1_agreement=1.0, tolerance=1e-4, images=2),
        licence=None,
        source=None,
        details={},
        made_with={"onefold": "0.1.0"},
        files=hash_files(folder),
    )
    (folder / MANIFEST_FILE).write_text(render_manifest(made))
    first = images[0].transpose(1, 2, 0) if runtime == "litert" else images[0]
    digest = hashlib.sha256(np.ascontiguousarray(first).tobytes()).hexdigest()
    (phone.home / "answers" / digest).write_bytes(logits[0].tobytes())
    return folder


def run(*arguments: object) -> int:
    return main(["phone", *(str(a) for a in arguments)])


def only_ledger() -> Path:
    [path] = Path("results").glob("*.jsonl")
    return path


# ----------------------------------------------------------------------------------- what is measured


def test_two_artifacts_are_compared_in_rounds_on_the_big_cores(phone: FakePhone, capsys):
    one, two = artifact(phone, "one", ms=10), artifact(phone, "it's; rm -rf $HOME", ms=20)
    assert run(one, two, *PAIRED) == 0
    said = capsys.readouterr().out
    assert "is 2x (95 % CI 2-2) slower than one litert fp32" in said
    starts = phone.started("benchmark_model")
    assert len(starts) == 5 * 3
    assert all(line[2:4] == ["taskset", "c0"] for line in starts)
    models = [next(word for word in line if word.startswith("--graph=")) for line in starts]
    for at in range(0, 15, 3):  # the baseline twice a round, the other once
        assert sorted(map(models[at : at + 3].count, {*models})) == [1, 2]
    assert len({tuple(models[at : at + 3]) for at in range(0, 15, 3)}) > 1  # and not always in one order
    flags = dict(word.split("=") for word in starts[0] if word.startswith("--"))
    assert (flags["--num_threads"], flags["--num_runs"], flags["--warmup_runs"]) == ("1", "4", "2")
    assert only_ledger().name == "google-pixel-99-google-tensor-g9-8c-android.jsonl"
    [outcome] = read_results(only_ledger()).comparisons
    assert isinstance(outcome, Comparison)
    first = outcome.measurements["one litert fp32"]
    assert (first.median_ns, first.calls_per_sample, len(first.samples_ns)) == (10e6, 4, 5)
    assert first.warmup_ns == (30_000_000,) * 5
    assert first.subject["answer"] == "checked on the phone"
    assert first.p90_ns is None  # a mean of four calls hides their tail
    assert first.verdict == "quiet"


def test_the_phone_is_recorded_and_its_serial_is_not(phone: FakePhone):
    assert run(artifact(phone, "one"), *QUICK) == 0
    [found] = read_results(only_ledger()).measurements
    machine = found.machine
    assert (machine.chip, machine.system) == ("Google Pixel 99 (Google Tensor G9)", "Android 17")
    assert (machine.architecture, machine.cores, machine.usable_cores) == ("arm64-v8a", 8, 2)
    assert (machine.max_mhz, machine.governor) == (3100.0, "sched_pixel")
    assert machine.features == ("bf16", "fp16", "neon", "dotprod", "i8mm")
    assert machine.memory_bytes == 11_800_000 * 1024
    assert found.procedure.threads == 1
    assert found.subject["cores"] == "big"
    assert found.subject["program"] == f"benchmark_model {hashlib.sha256(b'').hexdigest()[:12]}"
    assert found.subject["condition"] == {
        "heat": 0, "percent": 83, "charging": False, "battery_celsius": 28.1, "awake": True, "saving": False,
    }  # fmt: skip
    assert SERIAL not in only_ledger().read_text()


def test_the_report_draws_it(phone: FakePhone):
    assert run(artifact(phone, "one"), artifact(phone, "two", ms=20), *PAIRED) == 0
    assert main(["report", ".", "--out", "r.html"]) == 0
    page = Path("r.html").read_text()
    assert "Google Pixel 99 (Google Tensor G9)" in page
    assert "two litert fp32 is 2x" in page


@pytest.mark.parametrize("logcat", [False, True])
def test_executorch_tells_every_run_to_its_output_or_to_the_log(phone: FakePhone, logcat):
    phone.behave(logcat=logcat)
    assert run(artifact(phone, "one", "executorch", precision="int8"), *QUICK) == 0
    [found] = read_results(only_ledger()).measurements
    assert (len(found.samples_ns), found.calls_per_sample) == (8, 1)
    assert found.samples_ns[:4] == (10_003_000, 10_004_000, 10_005_000, 10_006_000)
    assert found.warmup_ns[:2] == (30_001_000, 10_002_000)
    assert found.subject["answer"] == "checked on the phone"


def test_onnx_runtime_writes_every_run_to_a_file(phone: FakePhone):
    assert run(artifact(phone, "one", "onnx"), *QUICK, "--threads", 4) == 0
    [found] = read_results(only_ledger()).measurements
    assert found.samples_ns == (10_000_000,) * 8
    assert found.warmup_ns[:2] == (30_000_000, 10_000_000)
    assert "not checked" in found.subject["answer"]
    assert found.machine.usable_cores == 4  # two are not enough for four threads
    line = phone.started("onnxruntime_perf_test")[0]
    assert line[2:4] == ["taskset", "f0"]
    assert line[line.index("-x") + 1] == "4"


def test_programs_of_several_kinds_are_compared_by_the_sums_of_their_processes(phone: FakePhone):
    assert run(artifact(phone, "one"), artifact(phone, "two", "onnx", ms=20), *PAIRED) == 0
    [outcome] = read_results(only_ledger()).comparisons
    assert {m.calls_per_sample for m in outcome.measurements.values()} == {4}
    assert outcome.ratio("two onnx fp32").value == pytest.approx(2.0)


def test_what_lies_on_the_phone_is_not_sent_again(phone: FakePhone):
    one = artifact(phone, "one")
    assert run(one, *QUICK) == 0
    sent = [call[-1] for call in phone.asked() if call[2:3] == ["push"]]
    assert len(sent) == 2
    assert all(re.fullmatch(r"/data/local/tmp/onefold/[0-9a-f]{16}/(model\.tflite|image\.bin)", path) for path in sent)
    assert run(one, *QUICK) == 0
    assert len([call for call in phone.asked() if call[2:3] == ["push"]]) == 2


def test_a_program_is_sent_under_the_name_that_its_vendor_gives_it(phone: FakePhone, tmp_path):
    shutil.rmtree(phone.home / "root/data/local/tmp/onefold")
    ours = tmp_path / "android_aarch64_benchmark_model"
    ours.write_bytes(b"\x7fELF")
    library = tmp_path / "libsomething.so"
    library.write_bytes(b"\x7fELF2")
    assert run(artifact(phone, "one"), *QUICK, "--program", ours, "--program", library) == 0
    folder = phone.home / "root/data/local/tmp/onefold"
    assert (folder / "benchmark_model").read_bytes() == b"\x7fELF"
    assert (folder / "libsomething.so").is_file()
    assert next(call[-1] for call in phone.asked() if "chmod" in call[-1]).endswith(
        "755 /data/local/tmp/onefold/benchmark_model"
    )


def test_an_old_program_that_writes_no_answer_is_measured_and_every_row_says_so(phone: FakePhone):
    phone.behave(old_tflite=True, all_same=True)
    assert run(artifact(phone, "one"), *QUICK) == 0
    [found] = read_results(only_ledger()).measurements
    assert found.subject["answer"] == "not checked on the phone: this benchmark_model does not write it"
    assert found.median_ns == 10e6


def test_a_program_that_cannot_be_asked_for_its_answer_is_measured_all_the_same(phone: FakePhone):
    phone.behave(refuses_proof=True)
    assert run(artifact(phone, "one", "executorch"), *QUICK) == 0
    [found] = read_results(only_ledger()).measurements
    assert found.subject["answer"].startswith("not checked on the phone")


def test_accuracy_goes_with_the_same_bytes(phone: FakePhone):
    one = artifact(phone, "one")
    digest = json.loads((one / MANIFEST_FILE).read_text())["files"]["model.tflite"]["sha256"]
    Path("results").mkdir()
    Path("results/accuracy.json").write_text(json.dumps({digest: {"top1": 71.4, "top1_on": "val"}}))
    assert run(one, *QUICK) == 0
    [found] = read_results(only_ledger()).measurements
    assert found.subject["top1"] == 71.4


# ------------------------------------------------------------------------------- heat, battery, screen


def bench(phone: FakePhone, slept: list[float], **changes: Any):
    plan = PhoneBenchPlan(rounds=3, runs=4, warmup=2, sleep=slept.append, **changes)
    return bench_on_phone(PhoneBenchOptions(sources=["one"], plan=plan), Path("results"))[0]


def test_a_warm_phone_is_given_time_to_cool(phone: FakePhone):
    artifact(phone, "one")
    slept: list[float] = []
    phone.behave(heats=[0, 0, 1, 1, 0])
    found = bench(phone, slept, rest_s=3.0)
    assert slept == [3.0, 10.0, 10.0, 3.0, 3.0]
    assert found.verdict == "quiet"


def test_one_that_does_not_cool_is_measured_and_told(phone: FakePhone, monkeypatch):
    monkeypatch.setattr("onefold.phone.benchmark._LONGEST_COOLING_S", 50.0)
    artifact(phone, "one")
    slept: list[float] = []
    phone.behave(heats=[0, 0, 2])
    found = bench(phone, slept, rest_s=0.0)
    assert sum(slept) == 2 * 50
    assert "The phone grew hot meanwhile: thermal status moderate at round 2." in found.reasons
    assert found.verdict == "noisy"


def test_anyway_measures_and_says_so_in_the_ledger(phone: FakePhone, capsys):
    phone.behave(level=9, status=3, low_power=1)
    one = artifact(phone, "one")
    assert run(one, *QUICK, "--anyway") == 0
    [found] = read_results(only_ledger()).measurements
    assert found.noise.remarks == (
        "Of the phone: its battery is at 9 %, and phones slow down below 20 %.",
        "Of the phone: its battery saver is on.",
    )
    assert found.verdict == "noisy"
    assert "battery saver is on" in capsys.readouterr().out


def test_what_a_condition_refuses_and_what_it_remarks():
    assert PhoneCondition(heat=0).refusals == PhoneCondition(heat=0).remarks == PhoneCondition().refusals == ()
    assert PhoneCondition().remarks == ("Whether the phone was hot is not known: it does not tell.",)
    assert PhoneCondition(heat=2).refusals == ("it is hot (thermal status moderate) and slows itself down",)
    assert PhoneCondition(heat=1, percent=90, charging=False, awake=True).refusals == ()
    assert PhoneCondition(percent=10, charging=True).refusals == ()
    assert len(PhoneCondition(heat=1, charging=True, battery_celsius=41.2, awake=False).remarks) == 4


def test_the_cores_that_are_meant(phone: FakePhone):
    found = read_phone_info(Adb(serial=SERIAL))
    assert found.cpu_mask("big", 1) == (6, 7)
    assert found.cpu_mask("big", 3) == (4, 5, 6, 7)
    assert found.cpu_mask("little", 1) == (0, 1, 2, 3)
    assert found.cpu_mask("all", 1) == tuple(range(8))
    assert found.cpu_mask("0,4-5", 1) == (0, 4, 5)
    for wrong in ("9", "big,little", "", "4-", "-1"):
        with pytest.raises(OnefoldError):
            found.cpu_mask(wrong, 1)


# --------------------------------------------------------------------------------------------- faults


def _damage(folder: Path) -> None:
    (folder / "model.tflite").write_bytes(b"\x0bno")


SAYS = {"program": {"says": "Segment loaded\nbye\n"}}
FAULTS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "no phone": (2, "no phone is connected", {"devices": {}}),
    "not allowed yet": (2, "allow USB debugging", {"devices": {SERIAL: "unauthorized"}}),
    "offline": (2, "is offline", {"devices": {SERIAL: "offline"}}),
    "no rights": (2, "udev rules", {"devices": {SERIAL: "no permissions (missing udev rules?)"}}),
    "several": (2, f"--serial one of {SERIAL}, other", {"devices": {SERIAL: "device", "other": "device"}}),
    "an emulator": (2, "is an emulator", {"emulator": True}),
    "no space": (5, "no space on the phone", {"free_kib": 10}),
    "a push that fails": (5, "No space left on device", {"push": "couldn't create file: No space left on device"}),
    "a read-only place": (5, "Read-only file system", {"read_only": True}),
    "half a file": (5, "did not arrive whole", {"push_short": True}),
    "hot": (1, "thermal status severe", {"heats": [3]}),
    "low": (1, "battery is at 12 %", {"level": 12}),
    "saving": (1, "battery saver is on", {"low_power": 1}),
    "killed": (9, "killed, perhaps for memory", {"program": {"status": 137}}),
    "crashed": (9, "crashed", {"program": {"status": 139, "errors": "Segmentation fault\n"}}),
    "another processor": (
        9,
        "build it for the phone's processor",
        {"program": {"status": 126, "errors": "not executable: 64-bit ELF file\n"}},
    ),
    "a missing library": (
        9,
        'library "libx.so" not found',
        {"program": {"status": 1, "errors": 'CANNOT LINK EXECUTABLE: library "libx.so" not found\n'}},
    ),
    "gibberish": (9, "cannot be understood: expected a line with count=", SAYS),
    "silence": (9, "its last line is nothing", {"program": {"says": "\n"}}),
    "another count": (
        9,
        "ran the network 3 times",
        {"program": {"says": "count=3 curr=5 (all same)\nInference (avg): 5\n"}},
    ),
    "an impossible time": (
        9,
        "a time that cannot be",
        {"program": {"says": "count=4 curr=0 (all same)\nInference (avg): 0\n"}},
    ),
    "unplugged": (9, "went away", {"program": {"gone_after": 2}}),
    "unplugged without a word": (9, "went away", {"program": {"gone_after": 2, "silently": True}}),
    "no taskset": (9, "--cores all", {"no_taskset": True}),
    "no clocks": (2, "which cores are big", {"no_clocks": True}),
}


@pytest.mark.parametrize(("status", "says", "told"), FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_gets_one_sentence_and_its_status(status, says, told, phone: FakePhone, capsys):
    one = artifact(phone, "one")
    phone.behave(**told)
    assert run(one, *QUICK) == status
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert says.lower() in lines[0].lower()
    assert "internal" not in lines[0]
    assert not list(Path().glob("results/*.jsonl"))


MISTAKES: dict[str, tuple[int, str, Callable[[FakePhone], list[object]]]] = {
    "no program": (
        2,
        "give it with --program PATH",
        lambda p: [(p.home / "root/data/local/tmp/onefold/benchmark_model").unlink(), artifact(p, "one")][1:],
    ),
    "a program that is not there": (2, "there is no program", lambda p: [artifact(p, "one"), "--program", "nowhere"]),
    "a program of nobody": (2, "is none of benchmark_model", lambda p: [artifact(p, "one"), "--program", __file__]),
    "another phone": (2, "no phone 'x' is connected", lambda p: [artifact(p, "one"), "--serial", "x"]),
    "not an artifact": (4, "expected an artifact folder", lambda _: ["nowhere"]),
    "a damaged artifact": (4, "damaged", lambda p: [a := artifact(p, "one"), _damage(a)][:1]),
    "too few rounds": (2, "needs 5 rounds", lambda p: [artifact(p, "a"), artifact(p, "b"), "--rounds", 2]),
    "cores of nobody": (2, "not 'most'", lambda p: [artifact(p, "one"), "--cores", "most"]),
    "a rest of a day": (2, "rest must be", lambda p: [artifact(p, "one"), "--rest", 86400]),
}


@pytest.mark.parametrize(("status", "says", "typed"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_gets_one_sentence_and_its_status(status, says, typed, phone: FakePhone, capsys):
    given = typed(phone)
    assert run(*QUICK, *given) == status
    assert says.lower() in capsys.readouterr().err.lower()


def test_without_adb_it_is_told_what_to_install(phone: FakePhone, capsys, monkeypatch):
    one = artifact(phone, "one")
    monkeypatch.setenv("PATH", str(phone.home))
    assert run(one, *QUICK) == 2
    assert "install Android's platform-tools" in capsys.readouterr().err


def test_a_phone_that_does_not_answer_is_given_up(phone: FakePhone, monkeypatch):
    artifact(phone, "one")
    phone.behave(program={"hangs": True})
    monkeypatch.setattr("onefold.phone.benchmark._LONGEST_RUN_S", 0.5)
    with pytest.raises(DeviceFailed, match="did not answer within"):
        bench(phone, [], rest_s=0.0)


def test_a_wrong_answer_is_not_measured(phone: FakePhone, capsys):
    one = artifact(phone, "one")
    for answer in (phone.home / "answers").iterdir():
        answer.write_bytes(np.float32([1, 2, 3]).tobytes())
    assert run(one, *QUICK) == 1
    assert "does not answer on the phone as it promises" in capsys.readouterr().err
    assert not phone.started("benchmark_model")


def test_a_runtime_without_a_program_is_told_before_the_phone_is_asked(phone: FakePhone, capsys):
    one = artifact(phone, "one", "onnx")
    text = (one / MANIFEST_FILE).read_text()
    fields = json.loads(text) | {"runtime": "openvino"}
    with pytest.raises(OnefoldError, match="those of litert, executorch, onnx can"):
        from onefold.phone import find_program

        find_program(fields["runtime"])
    assert phone.asked() == []


# ------------------------------------------------------------------------------ what the programs print

CALL = ProgramCall(
    program="p", model="m", image="i", answer="a-0.bin", times="t", shape=SHAPE, threads=1, warmup=1, runs=2
)


@pytest.mark.parametrize(
    ("runtime", "text"),
    [
        ("litert", "INFO: count=2 first=1 avg=1e3\n"),  # cut off before the summary
        ("executorch", "Iteration 1 of 3: 1.0 ms\nIteration 3 of 3: 1.0 ms\n"),  # a line was lost
        ("executorch", "Model executed successfully 3 time(s) in 9.0 ms.\n"),  # an old runner
        ("onnx", "m,0.01,1,1,0\nm,0.01,1,1,1\n"),  # one is missing
        ("onnx", "m,0.01,1,1,0\nm,0.01,1,1,1\nm,nan,1,1,2\n"),
    ],
)
def test_half_of_an_output_is_not_taken_for_the_whole(runtime, text):
    with pytest.raises(DeviceFailed, match="cannot be understood"):
        PROGRAMS[runtime].parse(text, CALL)


def test_large_means_are_read_in_every_notation():
    text = "count=1 curr=3512391\ncount=2 first=2990275 curr=2913402 min=2 max=3 avg=2.95034e+06 std=9\n"
    text += "Inference (avg): 2.95034e+06\n"
    assert PROGRAMS["litert"].parse(text, CALL).samples_ns == (2 * 2_950_340_000,)


def test_a_log_that_holds_two_processes_gives_the_later_one():
    text = "".join(f"Iteration {i} of 3: {ms} ms\n" for ms in (1, 2) for i in (1, 2, 3))
    assert PROGRAMS["executorch"].parse(text, CALL).samples_ns == (2_000_000, 2_000_000)


# ---------------------------------------------------------------------------------------------- iPhone


def test_a_line_as_the_iphone_command_writes_it_is_read_by_the_ledger(tmp_path: Path):
    text = (ROOT / "docs" / "phones.md").read_text()
    [line] = re.findall(r"```json\n(\{.*?\})\n```", text, re.S)
    (tmp_path / "iphone.jsonl").write_text(json.dumps(json.loads(line)) + "\n")
    [found] = read_results(tmp_path / "iphone.jsonl").measurements
    assert found.machine.system.startswith("iOS")
    swift = (ROOT / "benchmarks" / "iphone" / "Measure.swift").read_text()
    for key in json.loads(line) | json.loads(line)["subject"] | json.loads(line)["machine"]:
        assert re.search(rf"\b{key}\b", swift), f"Measure.swift does not write {key}"
    assert "targetEnvironment(simulator)" in swift
