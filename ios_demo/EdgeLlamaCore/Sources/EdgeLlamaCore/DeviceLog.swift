/// The device that ran a check or a benchmark.
public struct Device: Sendable {
    public let name: String
    public let os: String

    public init(name: String, os: String) {
        self.name = name
        self.os = os
    }
}

/// What a replayed sequence gave, one entry for each scored position.
public struct SequenceResult: Sendable {
    public let name: String
    public let tokensMatch: Bool
    public internal(set) var kl: [Double] = []
    public internal(set) var top1: [Bool] = []
    public internal(set) var parityKl: [Double] = []
    public internal(set) var parityTop1: [Bool] = []

    init(name: String, tokensMatch: Bool) {
        self.name = name
        self.tokensMatch = tokensMatch
    }

    public var parityKlMean: Double { mean(parityKl) }

    var json: Json {
        .object([
            "name": .string(name),
            "tokens_match": .bool(tokensMatch),
            "kl": .array(kl.map { Json.number($0) }),
            "top1": .array(top1.map { Json.bool($0) }),
            "parity_kl": .array(parityKl.map { Json.number($0) }),
            "parity_top1": .array(parityTop1.map { Json.bool($0) }),
        ])
    }
}

/// One question with its answer.
public struct Check: Sendable {
    public enum Value: Equatable, Sendable {
        case number(Double)
        case count(Int)
        case text(String)

        var json: Json {
            switch self {
            case .number(let value): return Json.number(value)
            case .count(let value): return .int(value)
            case .text(let value): return .string(value)
            }
        }
    }

    public let name: String
    public let passed: Bool
    public let value: Value
    public let limit: Value

    var json: Json {
        .object([
            "name": .string(name),
            "value": value.json,
            "limit": limit.json,
            "verdict": .string(passed ? "pass" : "fail"),
        ])
    }
}

/// The result of an accuracy check; `json` is the device log that `edgellama validate --device-log` reads.
public struct GoldenResult: Sendable {
    public static let schema: String = "edgellama.device/1"

    public let target: String
    public let family: String?
    public let runtime: String
    public let artifactSha256: String
    public let goldenSha256: String
    public let sequences: [SequenceResult]
    public let checks: [Check]
    public let prefillRate: Double?
    public let decodeRate: Double?

    public var passed: Bool { checks.allSatisfy { $0.passed } }
    public var klMean: Double { mean(sequences.flatMap { $0.kl }) }
    public var parityKlMean: Double { mean(sequences.flatMap { $0.parityKl }) }
    public var top1: Double { share(sequences.flatMap { $0.top1 }) }
    public var parityTop1: Double { share(sequences.flatMap { $0.parityTop1 }) }

    /// The log, schema edgellama.device/1. Figures that the device cannot tell are nil.
    public func json(device: Device, loadMillis: Double?, peakBytes: Int?) -> String {
        Json.object([
            "schema": .string(GoldenResult.schema),
            "device": .string(device.name),
            "os": .string(device.os),
            "runtime": .string(runtime),
            "target": .string(target),
            "family": family.map { Json.string($0) } ?? .null,
            "artifact_sha256": .string(artifactSha256),
            "golden_sha256": .string(goldenSha256),
            "sequences": .array(sequences.map { $0.json }),
            "kl_mean": Json.number(klMean),
            "parity_kl_mean": Json.number(parityKlMean),
            "top1_agreement": .double(top1),
            "parity_top1_agreement": .double(parityTop1),
            "prefill_tok_s": Json.number(prefillRate),
            "decode_tok_s": Json.number(decodeRate),
            "load_ms": Json.number(loadMillis),
            "peak_bytes": peakBytes.map { Json.int($0) } ?? .null,
            "checks": .array(checks.map { $0.json }),
            "verdict": .string(passed ? "pass" : "fail"),
        ]).written()
    }
}

func mean(_ values: [Double]) -> Double { values.reduce(0, +) / Double(values.count) }

private func share(_ values: [Bool]) -> Double { Double(values.filter { $0 }.count) / Double(values.count) }
