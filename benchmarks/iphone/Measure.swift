// Times a Core ML package of onefold on an iPhone and writes one line for its ledger. See docs/phones.md.
//
// Put this file in the place of an iOS app's `App` file, with model.mlpackage, manifest.json, image.bin and logits.bin
// in its bundle. Xcode compiles the package to model.mlmodelc. NOT YET RUN ON A DEVICE.

import CoreML
import SwiftUI
import UIKit

#if targetEnvironment(simulator)
#error("A simulator runs on the Mac's processor, and its times say nothing of a phone: choose a connected iPhone.")
#endif

let warmupCalls = 50
let warmupSeconds = 1.0
let samples = 1024
let minSeconds = 60.0

/// What went wrong, in a sentence.
struct Failure: LocalizedError {
    let errorDescription: String?
    init(_ text: String) { errorDescription = text }
}

/// What the artifact's manifest says of itself; the rest of it is not needed here.
struct Manifest: Decodable {
    struct Parity: Decodable { let tolerance: Double }
    struct Stored: Decodable { let sha256: String }
    let model: String
    let precision: String
    let fused: Bool
    let input_shape: [Int]
    let parity: Parity
    let files: [String: Stored]

    /// What tells these bytes from all others, as `onefold eval` and `bench` note it.
    var sha256: String {
        files.filter { $0.key.hasPrefix("model.") }.min { $0.key < $1.key }?.value.sha256 ?? ""
    }
}

/// The phone's heat, battery and saving as sentences that speak against the figures.
@MainActor
func remarks() -> [String] {
    UIDevice.current.isBatteryMonitoringEnabled = true
    var found: [String] = []
    switch ProcessInfo.processInfo.thermalState {
    case .nominal: break
    case .fair: found.append("The phone was warm (thermal state fair).")
    default: found.append("The phone was hot and slowed itself down.")
    }
    if ProcessInfo.processInfo.isLowPowerModeEnabled { found.append("The phone was in low power mode.") }
    if [.charging, .full].contains(UIDevice.current.batteryState) {
        found.append("The phone was charging, which warms it.")
    }
    let level = UIDevice.current.batteryLevel
    if level >= 0, level < 0.2 { found.append("The phone's battery was at \(Int(level * 100)) %.") }
    return found
}

/// The name of the hardware, such as iPhone16,1.
func hardware() -> String {
    var info = utsname()
    uname(&info)
    return withUnsafeBytes(of: &info.machine) { String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self) }
}

func bundled(_ name: String, _ kind: String) throws -> URL {
    guard let url = Bundle.main.url(forResource: name, withExtension: kind) else {
        throw Failure("\(name).\(kind) is not in the app: add it to the target (docs/phones.md)")
    }
    return url
}

func floats(_ name: String) throws -> [Float] {
    let data = try Data(contentsOf: bundled(name, "bin"))
    return data.withUnsafeBytes { Array($0.bindMemory(to: Float.self)) }
}

func nanoseconds(_ duration: Duration) -> Int {
    let parts = duration.components
    return Int(parts.seconds) * 1_000_000_000 + Int(parts.attoseconds / 1_000_000_000)
}

/// The smallest step that the clock shows.
func resolution() -> Int {
    let clock = ContinuousClock()
    var steps: [Int] = []
    var last = clock.now
    while steps.count < 1000 {
        let now = clock.now
        if now > last { steps.append(nanoseconds(last.duration(to: now))) }
        last = now
    }
    return max(1, steps.min() ?? 1)
}

/// A network, ready to answer one image.
struct Network {
    let model: MLModel
    let input: MLFeatureProvider
    let output: String

    init(units: MLComputeUnits, image: [Float], shape: [Int]) throws {
        let configuration = MLModelConfiguration()
        configuration.computeUnits = units
        model = try MLModel(contentsOf: bundled("model", "mlmodelc"), configuration: configuration)
        guard let name = model.modelDescription.inputDescriptionsByName.keys.first,
            let output = model.modelDescription.outputDescriptionsByName.keys.first
        else { throw Failure("the model has no input or no output") }
        guard image.count == shape.reduce(1, *) else {
            throw Failure("image.bin has \(image.count) numbers, and the manifest says \(shape)")
        }
        let array = try MLMultiArray(shape: ([1] + shape).map { NSNumber(value: $0) }, dataType: .float32)
        array.withUnsafeMutableBytes { bytes, _ in
            image.withUnsafeBytes { bytes.copyMemory(from: $0) }
        }
        input = try MLDictionaryFeatureProvider(dictionary: [name: MLFeatureValue(multiArray: array)])
        self.output = output
    }

    @discardableResult
    func answer() throws -> MLFeatureProvider { try model.prediction(from: input) }

    /// The logits, read by their places, whatever precision and strides they have.
    func logits() throws -> [Float] {
        guard let array = try answer().featureValue(for: output)?.multiArrayValue else {
            throw Failure("the model's output \(output) is no array")
        }
        return (0..<array.count).map { array[$0].floatValue }
    }
}

func check(_ network: Network, against promised: [Float], tolerance: Double) throws {
    let answer = try network.logits()
    guard answer.count == promised.count else {
        throw Failure("expected \(promised.count) logits, came \(answer.count)")
    }
    let largest = promised.map { abs($0) }.max() ?? 0
    let farthest = zip(answer, promised).map { abs($0 - $1) }.max() ?? .infinity
    guard Double(farthest / largest) <= tolerance else {
        throw Failure("the answer differs by \(farthest / largest) of the largest logit, \(tolerance) is allowed")
    }
}

/// One line for the ledger: the model checked, warmed up and timed on these units.
@MainActor
func measure(units: MLComputeUnits, named: String) async throws -> String {
    let manifest = try JSONDecoder().decode(Manifest.self, from: Data(contentsOf: bundled("manifest", "json")))
    let before = remarks()
    let image = try floats("image"), promised = try floats("logits")
    let (warmup, times) = try await Task.detached(priority: .userInitiated) { () -> ([Int], [Int]) in
        let network = try Network(units: units, image: image, shape: manifest.input_shape)
        let clock = ContinuousClock()
        var warmup: [Int] = [], times: [Int] = []
        let start = clock.now
        while warmup.count < warmupCalls || start.duration(to: clock.now) < .seconds(warmupSeconds) {
            let at = clock.now
            try network.answer()
            warmup.append(nanoseconds(at.duration(to: clock.now)))
        }
        try check(network, against: promised, tolerance: manifest.parity.tolerance)
        let middle = clock.now
        while times.count < samples || middle.duration(to: clock.now) < .seconds(minSeconds) {
            let at = clock.now
            try network.answer()
            times.append(nanoseconds(at.duration(to: clock.now)))
        }
        return (Array(warmup.prefix(50)), times)
    }.value
    let said = before + remarks().filter { !before.contains($0) }
    let cores = ProcessInfo.processInfo.processorCount
    let line: [String: Any] = [
        "kind": "measurement",
        "subject": [
            "model": manifest.model, "runtime": "coreml", "precision": manifest.precision, "fused": manifest.fused,
            "input_shape": manifest.input_shape, "batch": 1, "compute_units": named, "sha256": manifest.sha256,
            "name": "\(manifest.model) coreml \(manifest.precision) \(named)", "answer": "checked on the phone",
        ],
        "machine": [
            "chip": hardware(), "architecture": "arm64", "cores": cores,
            "usable_cores": ProcessInfo.processInfo.activeProcessorCount,
            "memory_bytes": Int(ProcessInfo.processInfo.physicalMemory),
            "system": "iOS \(UIDevice.current.systemVersion)",
        ],
        "procedure": [
            "warmup_calls": warmupCalls, "warmup_seconds": warmupSeconds, "samples": samples,
            "min_seconds": minSeconds, "threads": 1, "seed": 0,
        ],
        "noise": ["remarks": said],
        "resolution_ns": resolution(), "overhead_ns": 0, "calls_per_sample": 1,
        "warmup_ns": warmup, "samples_ns": times,
    ]
    let data = try JSONSerialization.data(withJSONObject: line, options: [.sortedKeys, .withoutEscapingSlashes])
    return String(decoding: data, as: UTF8.self)
}

@main
struct MeasureApp: App {
    var body: some Scene { WindowGroup { MeasureView() } }
}

struct MeasureView: View {
    @State private var said = "measuring; a little more than a minute each"
    @State private var file: URL?

    var body: some View {
        VStack {
            ScrollView { Text(said).font(.footnote.monospaced()).textSelection(.enabled) }
            if let file { ShareLink(item: file) }
        }
        .padding()
        .task { await run() }
    }

    @MainActor
    private func run() async {
        UIApplication.shared.isIdleTimerDisabled = true
        defer { UIApplication.shared.isIdleTimerDisabled = false }
        do {
            let place = URL.documentsDirectory.appending(path: "onefold.jsonl")
            var lines: [String] = []
            for (units, name) in [(MLComputeUnits.all, "all"), (.cpuOnly, "cpu")] {
                lines.append(try await measure(units: units, named: name))
                try await Task.sleep(for: .seconds(30))
            }
            try (lines.joined(separator: "\n") + "\n").write(to: place, atomically: true, encoding: .utf8)
            said = lines.joined(separator: "\n\n")
            file = place
        } catch {
            said = "error: \(error.localizedDescription)"
        }
    }
}
