"""A stand-in for adb and a phone behind it: it does what they were recorded to do, and fails when told to.

Run as `adb`. $FAKE_PHONE is a folder: `behaviour.json` says how the phone fares and what goes wrong, `root/` are its
files, `calls.jsonl` is what was asked of it, and `answers/<sha256 of an image>` what a network says of that image.
"""

import hashlib
import json
import os
import shlex
import sys
import time
from pathlib import Path

HOME = Path(os.environ["FAKE_PHONE"])
TOLD = json.loads((HOME / "behaviour.json").read_text())
ROOT = HOME / "root"
CORES = 8


def end(status=0, output="", errors=""):
    sys.stdout.write(output)
    sys.stderr.write(errors)
    sys.exit(status)


def local(path):
    return ROOT / path.lstrip("/")


def devices():
    lines = [f"{serial}\t{state}" for serial, state in TOLD["devices"].items()]
    end(output="\n".join(["List of devices attached", *lines, "", ""]))


def push(source, remote):
    if TOLD.get("push"):
        end(1, errors=f"adb: error: failed to copy '{source}' to '{remote}': remote {TOLD['push']}\n")
    data = Path(source).read_bytes()
    local(remote).parent.mkdir(parents=True, exist_ok=True)
    local(remote).write_bytes(data[:-1] if TOLD.get("push_short") else data)
    end(output=f"{source}: 1 file pushed, 0 skipped. 98.3 MB/s ({len(data)} bytes in 0.010s)\n")


def properties():
    told = {
        "ro.product.manufacturer": "Google",
        "ro.product.model": "Pixel 99",
        "ro.soc.manufacturer": "Google",
        "ro.soc.model": "Tensor G9",
        "ro.build.version.release": "17",
        "ro.product.cpu.abi": "arm64-v8a",
        "ro.hardware": "ranchu" if TOLD.get("emulator") else "tensor",
    }
    end(output="".join(f"[{name}]: [{value}]\n" for name, value in told.items()))


def dumpsys(what):
    if what == "battery":
        names = ("level", "status", "temperature")
        told = "".join(f"  {name}: {TOLD[name]}\n" for name in names)
        end(output=f"Current Battery Service state:\n  AC powered: false\n  USB powered: true\n  scale: 100\n{told}")
    if what == "thermalservice":
        heats = TOLD["heats"]
        seen = len([call for call in calls() if call[-1:] == ["dumpsys thermalservice"]])
        heat = heats[min(seen, len(heats)) - 1]
        end(output=f"IsStatusOverride: false\nThermalEventListeners:\n\tcallbacks: 2\nThermal Status: {heat}\n")
    end(output=f"POWER MANAGER (dumpsys power)\n  mWakefulness={TOLD['wakefulness']}\n")


def calls():
    return [json.loads(line) for line in (HOME / "calls.jsonl").read_text().splitlines()]


def cat(path):
    shown = {
        "/proc/cpuinfo": "".join(
            f"processor\t: {n}\nFeatures\t: fp asimd asimdhp asimddp i8mm bf16\n\n" for n in range(CORES)
        ),
        "/proc/meminfo": "MemTotal:       11800000 kB\nMemFree:         1000000 kB\n",
        "/sys/devices/system/cpu/possible": f"0-{CORES - 1}\n",
    }
    if path in shown:
        end(output=shown[path])
    if not local(path).is_file():
        end(1, errors=f"cat: {path}: No such file or directory\n")
    sys.stdout.buffer.write(local(path).read_bytes())
    end()


def of_cores(paths):
    """Two big cores, two middling, four small; core 7 does not tell its governor."""
    clocks = [1_700_000] * 4 + [2_400_000] * 2 + [3_100_000] * 2
    lines, missing = [], 0
    for path in paths:
        core = int(path.split("/cpu")[2].split("/")[0])
        if TOLD.get("no_clocks") or ("governor" in path and core == 7):
            missing += 1
        else:
            lines.append(f"{path}:{clocks[core] if 'max_freq' in path else 'sched_pixel'}\n")
    end(2 if missing else 0, "".join(lines), "grep: No such file or directory\n" * missing)


def program(command):
    """What a vendor's program says and writes; its time for one image is by the first byte of the model."""
    path, *arguments = command
    name = path.rpartition("/")[2]
    fault = TOLD.get("program", {})
    if not local(path).is_file():
        end(127, errors=f"env: exec {path}: No such file or directory\n")
    if "status" in fault:
        end(fault["status"], errors=fault.get("errors", ""))
    if "says" in fault:
        end(output=fault["says"])
    if "gone_after" in fault:
        started = sum(name in call[-1] and "taskset" in call[-1] for call in calls())
        if started > fault["gone_after"]:
            if fault.get("silently"):
                (HOME / "behaviour.json").write_text(json.dumps(TOLD | {"devices": {}}))
                end(255)
            end(1, errors=f"adb: device '{sys.argv[2]}' not found\n")
    if fault.get("hangs"):
        time.sleep(30)
    if TOLD.get("refuses_proof") and any("output_file" in each for each in arguments):
        end(1, errors="ERROR: unknown command line flag 'output_file'\n")
    flags = dict(each[2:].split("=", 1) for each in arguments if each.startswith("--"))
    {"benchmark_model": tflite, "executor_runner": executorch, "onnxruntime_perf_test": onnxruntime}[name](
        flags, arguments
    )


def us_of(model):
    return 1000 * local(model).read_bytes()[0]


def answer_to(image):
    found = HOME / "answers" / hashlib.sha256(local(image).read_bytes()).hexdigest()
    return found.read_bytes() if found.is_file() else bytes(12)


def tflite(flags, _arguments):
    us, runs = us_of(flags["graph"]), int(flags["num_runs"])
    warm = int(flags["warmup_runs"])
    if "output_filepath" in flags and not TOLD.get("old_tflite"):
        image = flags["input_layer_value_files"].split(":", 1)[1]
        local(flags["output_filepath"]).write_bytes(answer_to(image))
    lines = ["INFO: STARTING!", f"INFO: Graph: [{flags['graph']}]", "INFO: Initialized session in 3.126ms."]
    if warm:
        lines.append(f"INFO: count={warm} first={3 * us} curr={us} min={us} max={3 * us} avg={us * 1.4} std=5")
    if runs == 1 or TOLD.get("all_same"):
        lines.append(f"INFO: count={runs} curr={us}" + (" (all same)" if runs > 1 else ""))
    else:
        counts = f"count={runs} first={us} curr={us} min={us - 1} max={us + 1}"
        lines.append(f"INFO: {counts} avg={us:g} std=1 p5={us} median={us} p95={us}")
    lines.append(
        f"INFO: Inference timings in us: Init: 3126, First inference: {3 * us}, Warmup (avg): {us}, "
        f"Inference (avg): {us}"
    )
    lines.append("INFO: Note: as the benchmark tool itself affects memory footprint, the following is APPROXIMATE")
    end(errors="\n".join([*lines, ""]))


def executorch(flags, _arguments):
    count = int(flags["num_executions"])
    if "output_file" in flags:
        local(flags["output_file"] + "-0.bin").write_bytes(answer_to(flags["inputs"]))
    ms = us_of(flags["model_path"]) / 1000
    start = "I 00:00:00.002 executorch:executor_runner.cpp:480] " if not TOLD.get("logcat") else ""
    lines = [f"Iteration {i} of {count}: {ms * (3 if i == 1 else 1) + i / 1000:f} ms" for i in range(1, count + 1)]
    text = "".join(f"{start}{line}\n" for line in lines)
    if TOLD.get("logcat"):
        with (HOME / "log.txt").open("a") as log:
            log.write(text)
        end(output="OutputX 0: tensor(sizes=[1, 3], [0.1, 0.2, 0.3])\n")
    end(errors=text)


def onnxruntime(_flags, arguments):
    count, times = int(arguments[arguments.index("-r") + 1]), arguments[-1]
    seconds = us_of(arguments[-2]) / 1e6
    rows = [f"model,{seconds * (3 if i == 0 else 1):g},51200000,{12},{i}\n" for i in range(count)]
    local(times).write_text("".join(rows))
    end(output=f"Session creation time cost: 0.03 s\nTotal time cost:{seconds * count}\nTotal iterations:{count}\n")


def shell(line):
    command = shlex.split(line)
    verb, rest = command[0], command[1:]
    if verb == "getprop":
        properties()
    elif verb == "dumpsys":
        dumpsys(rest[0])
    elif verb == "settings":
        end(output=f"{TOLD['low_power']}\n")
    elif verb == "cat":
        cat(rest[0])
    elif verb == "grep":
        of_cores(rest[2:])
    elif verb == "mkdir":
        end(1, errors="mkdir: '/data': Read-only file system\n") if TOLD.get("read_only") else end()
    elif verb == "df":
        free = TOLD["free_kib"]
        end(output=f"Filesystem 1K-blocks Used Available Use% Mounted on\n/dev/dm-5 9000000 1 {free} 1% /data\n")
    elif verb == "sha256sum":
        there = local(rest[0])
        end(1) if not there.is_file() else end(output=f"{hashlib.sha256(there.read_bytes()).hexdigest()}  {rest[0]}\n")
    elif verb == "test":
        end(0 if local(rest[1]).is_file() else 1)
    elif verb == "rm":
        local(rest[1]).unlink(missing_ok=True)
    elif verb == "date":
        end(output="2026-11-28 12:00:00.000\n")
    elif verb == "logcat":
        end(output=(HOME / "log.txt").read_text())
    elif verb == "taskset":
        end(1, errors="taskset: not found\n") if TOLD.get("no_taskset") else end()
    elif verb == "env":
        program(rest[3:] if rest[1] == "taskset" else rest[1:])
    end()


def main():
    arguments = sys.argv[1:]
    with (HOME / "calls.jsonl").open("a") as file:
        file.write(json.dumps(arguments) + "\n")
    if arguments == ["devices"]:
        devices()
    assert arguments[0] == "-s"
    assert arguments[1] in TOLD["devices"]
    verb, *rest = arguments[2:]
    if verb == "push":
        push(*rest)
    assert len(rest) == 1, "adb joins what follows `shell` with spaces: it has to be one, quoted"
    shell(rest[0])
