import EdgeLlamaCore
import Foundation
import Observation

/// The accuracy check: replays the bundle's golden vectors and writes the device log; or answers a challenge.
@MainActor
@Observable
final class AccuracyScreen {
    let directory: URL
    let backend: Backend
    private(set) var isBusy: Bool = false
    private(set) var done: Int = 0
    private(set) var positions: Int = 1
    private(set) var lines: [String] = []
    private(set) var result: GoldenResult?
    private(set) var file: URL?
    private(set) var error: String?
    private var task: Task<Void, Never>?

    init(directory: URL, backend: Backend) {
        self.directory = directory
        self.backend = backend
    }

    /// NAME-BACKEND-device.json, or NAME-BACKEND-device-error.txt when the check could not be made.
    static func resultName(_ directory: URL, _ backend: Backend) -> String {
        "\(directory.deletingPathExtension().lastPathComponent)-\(backend.rawValue)-device.json"
    }

    static func errorName(_ directory: URL, _ backend: Backend) -> String {
        "\(directory.deletingPathExtension().lastPathComponent)-\(backend.rawValue)-device-error.txt"
    }

    /// NAME-BACKEND-response.json, or NAME-BACKEND-response-error.txt when the challenge could not be answered.
    static func responseName(_ directory: URL, _ backend: Backend) -> String {
        "\(directory.deletingPathExtension().lastPathComponent)-\(backend.rawValue)-response.json"
    }

    static func responseErrorName(_ directory: URL, _ backend: Backend) -> String {
        "\(directory.deletingPathExtension().lastPathComponent)-\(backend.rawValue)-response-error.txt"
    }

    func start() {
        if isBusy { return }
        task = Task { await check() }
    }

    /// Answers the challenge in a file that a person picked.
    func start(challenge: URL) {
        if isBusy { return }
        task = Task { await answer(challenge) }
    }

    func stop() {
        task?.cancel()
    }

    func check() async {
        let name: String = AccuracyScreen.resultName(directory, backend)
        await measure(name, AccuracyScreen.errorName(directory, backend)) {
            let loaded: Loaded = try await Models.shared.load(directory, backend) { self.lines.append($0) }
            let check: GoldenCheck = try GoldenCheck(bundle: loaded.bundle, target: backend.target)
            positions = check.positions
            lines.append("Replaying \(positions) positions. KL from the host's run of the same file:")
            let session: Session = loaded.session
            let worker: Worker = Models.shared.worker
            try await worker.run { session.reset() }
            for try await event in check.stream(session.model, tokenizer: loaded.tokenizer, on: worker) {
                switch event {
                case .progress(let count, let sequence):
                    done = count
                    if let sequence: SequenceResult = sequence { lines.append(AccuracyScreen.line(sequence)) }
                case .finished(let found):
                    let log: String = found.json(
                        device: Phone.device, loadMillis: loaded.loadMillis, peakBytes: Phone.peakBytes
                    )
                    file = try Storage.write(log, to: name)
                    result = found
                    lines += AccuracyScreen.verdict(found)
                }
            }
        }
    }

    /// Answers the challenge in the file `challenge`, and writes the response.
    func answer(_ challenge: URL) async {
        let name: String = AccuracyScreen.responseName(directory, backend)
        await measure(name, AccuracyScreen.responseErrorName(directory, backend)) {
            let text: [UInt8] = try Storage.read(challenge)
            let loaded: Loaded = try await Models.shared.load(directory, backend) { self.lines.append($0) }
            let asked: Challenge = try Challenge(
                text, name: challenge.lastPathComponent, bundle: loaded.bundle, target: backend.target
            )
            positions = asked.positions
            lines.append("Answering the challenge \(asked.nonce.prefix(12))… at \(positions) positions.")
            let session: Session = loaded.session
            let worker: Worker = Models.shared.worker
            try await worker.run { session.reset() }
            let answering: ChallengeRun = ChallengeRun(bundle: loaded.bundle, challenge: asked)
            for try await event in answering.stream(session.model, on: worker) {
                switch event {
                case .progress(let count):
                    done = count
                case .finished(let response):
                    let json: String = response.json(
                        device: Phone.device, loadMillis: loaded.loadMillis, peakBytes: Phone.peakBytes
                    )
                    file = try Storage.write(json, to: name)
                    lines.append("Answered. Only the host can judge it:")
                    lines.append("edgellama validate --challenge … --response …")
                }
            }
        }
    }

    /// Runs `work` as the one thing of this screen. It writes the file `name`, or why it could not to `errorName`.
    private func measure(_ name: String, _ errorName: String, _ work: @MainActor () async throws -> Void) async {
        isBusy = true
        done = 0
        lines = []
        result = nil
        file = nil
        error = nil
        Phone.keepAwake(true)
        defer {
            isBusy = false
            Phone.keepAwake(false)
        }
        Storage.forget(name)
        Storage.forget(errorName)
        do {
            try await work()
            if file == nil { lines.append("Stopped.") }
        } catch {
            let reason: String = sentence(error)
            self.error = reason
            _ = try? Storage.write(reason + "\n", to: errorName)
        }
    }

    private static func line(_ sequence: SequenceResult) -> String {
        let tokens: String = sequence.tokensMatch ? "" : "  OTHER TOKENS THAN THE HOST'S"
        return number(sequence.parityKlMean) + "  " + sequence.name + tokens
    }

    static func verdict(_ result: GoldenResult) -> [String] {
        var lines: [String] = [""]
        for check in result.checks {
            let mark: String = check.passed ? "ok    " : "FAIL  "
            lines.append("\(mark)\(check.name): \(text(check.value)), limit \(text(check.limit))")
        }
        lines.append("")
        lines.append(String(format: "KL from the full-precision model %.4f", result.klMean))
        lines.append(
            String(
                format: "top-1 %.1f%% of the host's run, %.1f%% of the full-precision model",
                100 * result.parityTop1, 100 * result.top1
            )
        )
        lines.append("prefill \(perSecond(result.prefillRate)), decode \(perSecond(result.decodeRate))")
        lines.append(result.passed ? "PASS: this device computes the model as it was validated." : "FAIL")
        return lines
    }

    private static func text(_ value: Check.Value) -> String {
        switch value {
        case .number(let value): return number(value)
        case .count(let value): return String(value)
        case .text(let value): return value
        }
    }

    private static func number(_ value: Double) -> String { String(format: "%.2e", value) }
}
