public enum CheckEvent: Sendable {
    /// How many positions are done, and the sequence that was finished with the last of them.
    case progress(Int, SequenceResult?)
    case finished(GoldenResult)
}

/// The accuracy check: feeds the golden sequences to the model and compares its logits with the host's.
///
/// A KL that is no number fails every limit, and so does a tokenizer that gives other tokens than the host's.
public struct GoldenCheck: Sendable {
    private let bundle: ModelBundle
    private let target: String
    private let golden: Golden
    private let family: String?
    private let clock: NanoClock

    /// kind: of this device's processor (`Processor.kind`), which decides with which rows it is compared.
    public init(
        bundle: ModelBundle, target: String, kind: String = Processor.kind, clock: NanoClock = .system
    ) throws {
        self.bundle = bundle
        self.target = target
        self.clock = clock
        golden = try Golden(bundle)
        family = try golden.family(target, kind)
    }

    /// Positions that are scored, for a progress bar.
    public var positions: Int { golden.positions }

    /// Replays everything on the worker that the model belongs to. Who stops listening stops it.
    public func stream(
        _ model: any LogitsModel, tokenizer: Tokenizer, on worker: Worker
    ) -> AsyncThrowingStream<CheckEvent, any Error> {
        worker.stream { (emit: (CheckEvent) -> Void, stopped: () -> Bool) in
            let result: GoldenResult? = try run(model, tokenizer: tokenizer, stopped: stopped) {
                emit(.progress($0, $1))
            }
            if let result: GoldenResult = result { emit(.finished(result)) }
        }
    }

    /// Replays everything. Nil when `stopped` said so.
    public func run(
        _ model: any LogitsModel, tokenizer: Tokenizer, stopped: () -> Bool = { false },
        onProgress: (Int, SequenceResult?) -> Void = { _, _ in }
    ) throws -> GoldenResult? {
        let reference: Expectation = try golden.reference()
        let host: Expectation = try golden.artifact(target, family)
        var results: [SequenceResult] = []
        var prefill: Timed = Timed(clock: clock)
        var decode: Timed = Timed(clock: clock)
        var row: Int = 0
        for sequence in golden.sequences {
            let matches: Bool = try tokens(sequence, tokenizer) == sequence.tokens
            var result: SequenceResult = SequenceResult(name: sequence.name, tokensMatch: matches)
            for position in sequence.scoreFrom..<sequence.tokens.count {
                if stopped() { return nil }
                let logits: [Float]
                if position == sequence.scoreFrom {
                    var from: Int = 0
                    while position + 1 - from > Session.piece {
                        let piece: [Int] = Array(sequence.tokens[from..<from + Session.piece])
                        _ = try prefill.time(piece.count) { try model.forward(piece, at: from) }
                        from += Session.piece
                        if stopped() { return nil }
                    }
                    let prompt: [Int] = Array(sequence.tokens[from...position])
                    logits = try prefill.time(prompt.count) { try model.forward(prompt, at: from) }
                } else {
                    logits = try decode.time(1) { try model.forward([sequence.tokens[position]], at: position) }
                }
                try GoldenCheck.measure(logits, bundle.outputSize)
                result.kl.append(reference.kl(row, logits))
                result.top1.append(reference.top1(row, logits))
                result.parityKl.append(host.kl(row, logits))
                result.parityTop1.append(host.top1(row, logits))
                row += 1
                onProgress(row, position == sequence.tokens.count - 1 ? result : nil)
            }
            results.append(result)
        }
        return GoldenResult(
            target: target,
            family: family,
            runtime: model.runtime,
            artifactSha256: try bundle.artifactSha256(target),
            goldenSha256: golden.sha256,
            sequences: results,
            checks: try judge(results),
            prefillRate: prefill.rate,
            decodeRate: decode.rate
        )
    }

    /// The ids in the vectors are indices into the logits.
    static func measure(_ logits: [Float], _ outputSize: Int) throws {
        if logits.count != outputSize {
            throw EdgeLlamaError(
                .model,
                "the model gave \(logits.count) logits, the manifest says \(outputSize)",
                remedy: EdgeLlamaError.exportAgain
            )
        }
    }

    private func judge(_ results: [SequenceResult]) throws -> [Check] {
        let limits: (mean: Double, sequence: Double) = try golden.limits(target, family)
        let mean: Double = EdgeLlamaCore.mean(results.flatMap { $0.parityKl })
        var worst: Double = 0
        for result in results where !worst.isNaN && !(result.parityKlMean <= worst) { worst = result.parityKlMean }
        let matching: Int = results.filter { $0.tokensMatch }.count
        let sha256: String = try bundle.artifactSha256(target)
        let recorded: String = try golden.artifactSha256(target)
        return [
            Check(
                name: "artifact", passed: sha256 == recorded, value: .text(String(sha256.prefix(12))),
                limit: .text(String(recorded.prefix(12)))
            ),
            Check(
                name: "tokenizer", passed: matching == results.count, value: .count(matching),
                limit: .count(results.count)
            ),
            Check(name: "parity_kl", passed: mean <= limits.mean, value: .number(mean), limit: .number(limits.mean)),
            Check(
                name: "parity_kl_sequence", passed: worst <= limits.sequence, value: .number(worst),
                limit: .number(limits.sequence)
            ),
        ]
    }

    /// The sequence's tokens as this device makes them.
    private func tokens(_ sequence: GoldenSequence, _ tokenizer: Tokenizer) throws -> [Int] {
        var text: String = sequence.text
        if let messages: [Message] = sequence.messages, let format: ChatFormat = bundle.chatFormat {
            text = try format.render(messages, addGenerationPrompt: true)
        }
        return tokenizer.encode(text, addSpecialTokens: sequence.addSpecialTokens)
    }
}

/// Tokens and time of calls of one kind.
struct Timed {
    let clock: NanoClock
    private var tokens: Int = 0
    private var nanos: UInt64 = 0

    init(clock: NanoClock) {
        self.clock = clock
    }

    mutating func time(_ count: Int, _ forward: () throws -> [Float]) rethrows -> [Float] {
        let start: UInt64 = clock.nanos()
        let logits: [Float] = try forward()
        nanos += clock.nanos() - start
        tokens += count
        return logits
    }

    var rate: Double? { EdgeLlamaCore.rate(tokens, nanos) }
}
