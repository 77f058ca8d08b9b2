import EdgeLlamaCore
import Foundation
import Observation

/// Labels of texts: one at a time, each read from the start.
@MainActor
@Observable
final class ClassifyScreen {
    let directory: URL
    let backend: Backend
    private(set) var answer: Classification?
    /// It decides whether the answer is flagged; nil without one.
    private(set) var threshold: Threshold?
    private(set) var status: String = ""
    private(set) var error: String?
    private(set) var isBusy: Bool = false
    private var task: Task<Void, Never>?

    init(directory: URL, backend: Backend) {
        self.directory = directory
        self.backend = backend
    }

    func stop() {
        task?.cancel()
    }

    func classify(_ text: String) {
        if isBusy { return }
        isBusy = true
        task = Task { await judge(text) }
    }

    private func judge(_ text: String) async {
        answer = nil
        error = nil
        Phone.keepAwake(true)
        defer {
            isBusy = false
            Phone.keepAwake(false)
        }
        do {
            let loaded: Loaded = try await Models.shared.load(directory, backend) { self.status = $0 }
            let classifier: TextClassifier = try TextClassifier(
                bundle: loaded.bundle, target: backend.target, tokenizer: loaded.tokenizer
            )
            threshold = classifier.threshold
            status = "Reading…"
            let start: UInt64 = NanoClock.system.nanos()
            let found: Classification? = try await classifier.classify(
                text, session: loaded.session, on: Models.shared.worker
            )
            let millis: Double = Double(NanoClock.system.nanos() - start) / 1e6
            answer = found
            status = found.map { ClassifyScreen.text($0, millis, loaded) } ?? "Stopped."
        } catch {
            self.error = sentence(error)
            status = ""
        }
    }

    /// What the threshold says of the answer; nil without one.
    var verdict: String? {
        guard let threshold: Threshold = threshold, let flagged: Bool = answer?.flagged else { return nil }
        let least: String = ClassifyScreen.percent(threshold.probability)
        return flagged
            ? "Flagged: \(threshold.label) has \(least) or more" : "Not flagged: \(threshold.label) has less than \(least)"
    }

    static func percent(_ share: Double) -> String { String(format: "%.1f %%", 100 * share) }

    private static func text(_ found: Classification, _ millis: Double, _ loaded: Loaded) -> String {
        let times: String = String(format: "answer %.0f ms, load %.0f ms", millis, loaded.loadMillis)
        return "\(found.tokens) tokens, \(times), memory \(megabytes(Phone.usedBytes))"
    }
}
