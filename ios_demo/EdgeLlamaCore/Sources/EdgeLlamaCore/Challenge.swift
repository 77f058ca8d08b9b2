import Foundation

/// Tokens to feed; positions from `scoreFrom` on are answered, as in the golden vectors.
public struct ChallengeSequence: Sendable {
    public let name: String
    let tokens: [Int]
    let scoreFrom: Int

    var scored: Int { tokens.count - scoreFrom }
}

/// What `edgellama challenge` wrote: schema edgellama.challenge/1. It belongs to one artifact of one bundle.
public struct Challenge: Sendable {
    public static let schema: String = "edgellama.challenge/1"
    private static let makeAgain: String = "Make a challenge with `edgellama challenge` from the bundle on this device."

    public let nonce: String
    public let target: String
    let artifactSha256: String
    let topK: Int
    public let sequences: [ChallengeSequence]

    /// Positions that are answered, for a progress bar.
    public var positions: Int { sequences.reduce(0) { $0 + $1.scored } }

    /// The challenge in `text`, the content of the file called `name`, for the artifact of `bundle` for `target`.
    /// Throws when it is none, or one for something else. Whether it has expired, the host says.
    public init(_ text: [UInt8], name: String, bundle: ModelBundle, target: String) throws {
        if bundle.classifier != nil {
            throw EdgeLlamaError.bundle(
                "\(bundle.name) classifies texts, and a challenge is about next tokens",
                remedy: "Run the accuracy check, which a classifier has as well."
            )
        }
        let json: JsonObject = try JsonObject.parse(text, name: name)
        let schema: String? = try json.stringOrNil("schema")
        if schema != Challenge.schema {
            throw EdgeLlamaError.bundle(
                "\(name): schema is \(schema ?? "missing"), this app reads \(Challenge.schema)",
                remedy: Challenge.makeAgain
            )
        }
        nonce = try json.string("nonce")
        self.target = try json.string("target")
        artifactSha256 = try json.string("artifact_sha256")
        topK = try json.int("top_k")
        sequences = try json.objects("sequences").map { try Challenge.sequence($0, name, bundle) }
        if self.target != target {
            throw EdgeLlamaError.bundle(
                "\(name) is about the target \(self.target), not about \(target)", remedy: Challenge.makeAgain
            )
        }
        if artifactSha256 != (try bundle.artifactSha256(target)) {
            throw EdgeLlamaError.bundle(
                "\(name) is about another artifact than that of \(bundle.name)", remedy: Challenge.makeAgain
            )
        }
        if topK < 1 || topK >= bundle.vocabSize || sequences.isEmpty {
            throw EdgeLlamaError.bundle(
                "\(name) asks for \(topK) tokens at \(sequences.count) sequences", remedy: Challenge.makeAgain
            )
        }
    }

    private static func sequence(
        _ json: JsonObject, _ name: String, _ bundle: ModelBundle
    ) throws -> ChallengeSequence {
        let sequence: ChallengeSequence = ChallengeSequence(
            name: try json.string("name"), tokens: try json.ints("tokens"), scoreFrom: try json.int("score_from")
        )
        let fits: Bool = sequence.tokens.count <= bundle.contextLength
            && sequence.tokens.indices.contains(sequence.scoreFrom)
            && !sequence.tokens.contains { $0 >= bundle.vocabSize }
        if !fits {
            throw EdgeLlamaError.bundle("\(name): the sequence \(sequence.name) does not fit this model", remedy: makeAgain)
        }
        return sequence
    }
}

/// The most probable tokens at a position, best first and of equal ones the smaller id, with their log-probabilities,
/// and the log of the probability of all others: nil where that is zero. All are nil for broken logits.
struct TopTokens: Sendable {
    let ids: [Int]
    let logp: [Double?]
    let rest: Double?

    /// The `k` most probable tokens of `logits`, fewer than all.
    init(_ logits: [Float], _ k: Int) {
        if logits.contains(where: { !$0.isFinite }) {
            ids = Array(0..<k)
            logp = [Double?](repeating: nil, count: k)
            rest = nil
            return
        }
        let order: [Int] = logits.indices.sorted { (a: Int, b: Int) -> Bool in
            logits[a] != logits[b] ? logits[a] > logits[b] : a < b
        }
        let best: [Int] = Array(order.prefix(k))
        let top: Double = Double(logits[best[0]])
        var inside: Double = 0
        for id in best { inside += exp(Double(logits[id]) - top) }
        var outside: Double = 0  // summed apart: as a difference it would lose its digits
        for id in order.dropFirst(k) { outside += exp(Double(logits[id]) - top) }
        let total: Double = log(inside + outside)
        let others: Double = log(outside) - total
        ids = best
        logp = best.map { (id: Int) -> Double? in Double(logits[id]) - top - total }
        rest = others.isFinite ? others : nil
    }
}

/// The answer to a challenge; `json` is the file that `edgellama validate --response` reads.
public struct Response: Sendable {
    public static let schema: String = "edgellama.response/1"

    let challenge: Challenge
    let runtime: String
    let artifactSha256: String
    let answers: [[TopTokens]]
    public let prefillRate: Double?
    public let decodeRate: Double?

    /// The response, schema edgellama.response/1. Figures that the device cannot tell are nil.
    public func json(device: Device, loadMillis: Double?, peakBytes: Int?) -> String {
        var sequences: [Json] = []
        for (sequence, rows) in zip(challenge.sequences, answers) {
            sequences.append(
                Json.object([
                    "name": .string(sequence.name),
                    "ids": .array(rows.map { (row: TopTokens) -> Json in .array(row.ids.map { Json.int($0) }) }),
                    "logp": .array(rows.map { (row: TopTokens) -> Json in .array(row.logp.map { Json.number($0) }) }),
                    "rest": .array(rows.map { (row: TopTokens) -> Json in Json.number(row.rest) }),
                ])
            )
        }
        return Json.object([
            "schema": .string(Response.schema),
            "nonce": .string(challenge.nonce),
            "target": .string(challenge.target),
            "family": .null,  // the app runs no target that processors round in different ways
            "artifact_sha256": .string(artifactSha256),
            "device": .string(device.name),
            "os": .string(device.os),
            "runtime": .string(runtime),
            "sequences": .array(sequences),
            "prefill_tok_s": Json.number(prefillRate),
            "decode_tok_s": Json.number(decodeRate),
            "load_ms": Json.number(loadMillis),
            "peak_bytes": peakBytes.map { Json.int($0) } ?? .null,
        ]).written()
    }
}

public enum ChallengeEvent: Sendable {
    /// How many positions are done.
    case progress(Int)
    case finished(Response)
}

/// Answers a challenge: feeds its tokens as the golden check does, and says what the model holds for probable.
public struct ChallengeRun: Sendable {
    private let bundle: ModelBundle
    private let challenge: Challenge
    private let clock: NanoClock

    public init(bundle: ModelBundle, challenge: Challenge, clock: NanoClock = .system) {
        self.bundle = bundle
        self.challenge = challenge
        self.clock = clock
    }

    /// Answers everything on the worker that the model belongs to. Who stops listening stops it.
    public func stream(_ model: any LogitsModel, on worker: Worker) -> AsyncThrowingStream<ChallengeEvent, any Error> {
        worker.stream { (emit: (ChallengeEvent) -> Void, stopped: () -> Bool) in
            let response: Response? = try run(model, stopped: stopped) { emit(.progress($0)) }
            if let response: Response = response { emit(.finished(response)) }
        }
    }

    /// Answers everything. Nil when `stopped` said so.
    public func run(
        _ model: any LogitsModel, stopped: () -> Bool = { false }, onProgress: (Int) -> Void = { _ in }
    ) throws -> Response? {
        var answers: [[TopTokens]] = []
        var prefill: Timed = Timed(clock: clock)
        var decode: Timed = Timed(clock: clock)
        var done: Int = 0
        for sequence in challenge.sequences {
            var rows: [TopTokens] = []
            for position in sequence.scoreFrom..<sequence.tokens.count {
                if stopped() { return nil }
                let logits: [Float]
                if position == sequence.scoreFrom {
                    let prompt: [Int] = Array(sequence.tokens[...position])
                    logits = try prefill.time(prompt.count) { try model.forward(prompt, at: 0) }
                } else {
                    logits = try decode.time(1) { try model.forward([sequence.tokens[position]], at: position) }
                }
                try GoldenCheck.measure(logits, bundle.outputSize)
                rows.append(TopTokens(logits, challenge.topK))
                done += 1
                onProgress(done)
            }
            answers.append(rows)
        }
        return Response(
            challenge: challenge,
            runtime: model.runtime,
            artifactSha256: try bundle.artifactSha256(challenge.target),
            answers: answers,
            prefillRate: prefill.rate,
            decodeRate: decode.rate
        )
    }
}
