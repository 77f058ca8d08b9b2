import EdgeLlamaCore
import Foundation
import Observation

/// The benchmark: prefill and decode, several runs, median and range.
@MainActor
@Observable
final class BenchmarkScreen {
    private static let text: String = "The quick brown fox jumps over the lazy dog, and then it does so once more. "

    let directory: URL
    let backend: Backend
    var plan: BenchmarkPlan = BenchmarkPlan()
    private(set) var isBusy: Bool = false
    private(set) var done: Int = 0
    private(set) var lines: [String] = []
    private(set) var file: URL?
    private(set) var error: String?
    private var task: Task<Void, Never>?

    init(directory: URL, backend: Backend) {
        self.directory = directory
        self.backend = backend
    }

    var allRuns: Int { max(plan.warmUps + plan.runs, 1) }

    func start() {
        if isBusy { return }
        task = Task { await measure() }
    }

    func stop() {
        task?.cancel()
    }

    private func measure() async {
        isBusy = true
        done = 0
        lines = []
        file = nil
        error = nil
        Phone.keepAwake(true)
        defer {
            isBusy = false
            Phone.keepAwake(false)
        }
        do {
            let loaded: Loaded = try await Models.shared.load(directory, backend) { self.lines.append($0) }
            let before: String = Phone.thermalState
            let session: Session = loaded.session
            let worker: Worker = Models.shared.worker
            try await worker.run { session.reset() }
            let tokens: [Int] = loaded.tokenizer.encode(BenchmarkScreen.text, addSpecialTokens: false)
            let benchmark: Benchmark = Benchmark(model: session.model, target: backend.target)
            for try await event in benchmark.stream(plan, text: tokens, on: worker) {
                switch event {
                case .run(let count): done = count
                case .finished(let result): try finish(result, loaded, thermalBefore: before)
                }
            }
            if file == nil { lines.append("Stopped.") }
        } catch {
            self.error = sentence(error)
        }
    }

    private func finish(_ result: BenchmarkResult, _ loaded: Loaded, thermalBefore: String) throws {
        let extra: [String: Json] = [
            "peak_bytes": Phone.peakBytes.map { Json.int($0) } ?? .null,
            "thermal_state_before": .string(thermalBefore),
            "thermal_state_after": .string(Phone.thermalState),
        ]
        let log: String = try result.json(
            bundle: loaded.bundle, device: Phone.device, loadMillis: loaded.loadMillis, extra: extra
        )
        let name: String = directory.deletingPathExtension().lastPathComponent
        file = try Storage.write(log, to: "\(name)-\(backend.rawValue)-benchmark.json")
        lines += [
            "prefill of \(result.plan.promptTokens): \(range(result.prefillRate)) tok/s",
            "decode of \(result.plan.decodeTokens): \(range(result.decodeRate)) tok/s",
            "first token: \(range(result.firstTokenMillis)) ms",
            String(format: "load: %.0f ms", loaded.loadMillis),
            "memory at most: \(megabytes(Phone.peakBytes))",
            "thermal state: \(thermalBefore), then \(Phone.thermalState)",
            "Median of \(result.plan.runs) runs [lowest, highest], after \(result.plan.warmUps) to warm up.",
        ]
    }

    private func range(_ figure: Figure) -> String {
        String(format: "%.1f [%.1f, %.1f]", figure.median, figure.low, figure.high)
    }
}
