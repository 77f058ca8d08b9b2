import Foundation

/// Tokens to replay; positions from `scoreFrom` on are scored: position i is what the model says after tokens[i].
struct GoldenSequence: Sendable {
    let name: String
    let text: String
    let addSpecialTokens: Bool
    let messages: [Message]?
    let tokens: [Int]
    let scoreFrom: Int

    var scored: Int { tokens.count - scoreFrom }
}

/// What a model said on the host: for each position the top k ids with log-probabilities, and the log of the rest.
struct Expectation: Sendable {
    let k: Int
    let ids: [Int]
    let logp: [Float]
    let rest: [Float]

    /// D(this || logits) at row `row`, nats, over the k + 1 buckets. NaN or infinite for broken logits.
    func kl(_ row: Int, _ logits: [Float]) -> Double {
        let top: Double = Double(logits.max() ?? 0)
        var kept: [Bool] = [Bool](repeating: false, count: logits.count)
        var inside: Double = 0
        for i in row * k..<(row + 1) * k {
            kept[ids[i]] = true
            inside += exp(Double(logits[ids[i]]) - top)
        }
        var outside: Double = 0  // summed apart: as a difference it would lose its digits
        for id in logits.indices where !kept[id] { outside += exp(Double(logits[id]) - top) }
        let total: Double = log(inside + outside)
        var kl: Double = Expectation.term(rest[row], log(outside) - total)
        for i in row * k..<(row + 1) * k { kl += Expectation.term(logp[i], Double(logits[ids[i]]) - top - total) }
        return kl < 0 ? 0 : kl
    }

    /// Whether the most probable token at row `row` is the same.
    func top1(_ row: Int, _ logits: [Float]) -> Bool {
        var best: Int = 0
        for id in logits.indices where logits[id] > logits[best] { best = id }
        return best == ids[row * k]
    }

    private static func term(_ ours: Float, _ theirs: Double) -> Double {
        ours == -Float.infinity ? 0 : exp(Double(ours)) * (Double(ours) - theirs)
    }
}

/// The golden vectors of a bundle: schema edgellama.golden/1.
struct Golden: Sendable {
    static let schema: String = "edgellama.golden/1"
    static let reference: String = "reference"
    private static let directory: String = "golden"
    private static let file: String = "golden/golden.json"

    let sequences: [GoldenSequence]
    let sha256: String
    private let k: Int
    private let json: JsonObject
    private let bundle: ModelBundle

    /// The golden vectors of `bundle`, verified.
    init(_ bundle: ModelBundle) throws {
        guard bundle.has(Golden.file) else {
            throw EdgeLlamaError.bundle(
                "this bundle has no golden vectors, so accuracy cannot be checked",
                remedy: "Export it again with a current edgellama."
            )
        }
        let json: JsonObject = try JsonObject.parse(try bundle.bytes(Golden.file), name: Golden.file)
        let schema: String? = try json.stringOrNil("schema")
        if schema != Golden.schema {
            throw EdgeLlamaError.bundle("\(Golden.file): schema is \(schema ?? "missing"), this app reads \(Golden.schema)")
        }
        self.bundle = bundle
        self.json = json
        k = try json.int("top_k")
        sha256 = try bundle.sha256(Golden.file)
        sequences = try json.objects("sequences").map { try Golden.sequence($0, bundle) }
        if k < 1 || sequences.isEmpty { throw EdgeLlamaError.bundle("\(Golden.file): nothing to replay") }
    }

    /// Positions that are scored, of all sequences.
    var positions: Int { sequences.reduce(0) { $0 + $1.scored } }

    /// The hash of the artifact that was run on the host.
    func artifactSha256(_ target: String) throws -> String {
        try json.object("artifacts").object(target).string("sha256")
    }

    /// The family of processors that `kind` belongs to (`Processor.kind`): they round `target` alike.
    /// Nil where all processors do, and in older bundles.
    func family(_ target: String, _ kind: String) throws -> String? {
        let artifact: JsonObject = try json.object("artifacts").object(target)
        if let others: JsonObject = try artifact.objectOrNil("families") {
            for member in others.members {
                let kinds: [Json] = try others.object(member.name).array("processors")
                if kinds.contains(.string(kind)) { return member.name }
            }
        }
        return try artifact.stringOrNil("family")
    }

    /// KL from what processors of `family` compute, in nats: of all positions, and of the worst sequence.
    func limits(_ target: String, _ family: String?) throws -> (mean: Double, sequence: Double) {
        let host: JsonObject = try json.object("limits").object(target)
        let limits: JsonObject = try other(target, family)?.object("limits") ?? host
        return (try limits.double("parity_kl_mean"), try limits.double("parity_kl_sequence"))
    }

    /// What processors of `family` compute for `target`: the host that exported it, or its replica of another family.
    func artifact(_ target: String, _ family: String?) throws -> Expectation {
        guard let family: String = family, let entry: JsonObject = try other(target, family) else {
            return try expectation(target, k)
        }
        return try expectation("\(target).\(family)", try entry.int("top_k"))
    }

    /// What the full-precision model said at each scored position.
    func reference() throws -> Expectation { try expectation(Golden.reference, k) }

    /// The entry of a family that the host does not belong to; nil for the host's own.
    private func other(_ target: String, _ family: String?) throws -> JsonObject? {
        guard let family: String = family else { return nil }
        return try json.object("artifacts").object(target).objectOrNil("families")?.objectOrNil(family)
    }

    private func expectation(_ name: String, _ k: Int) throws -> Expectation {
        let ids: [Int] = try words("\(name).ids", "uint32", [positions, k]).map { Int($0) }
        if ids.contains(where: { $0 >= bundle.outputSize }) {
            throw EdgeLlamaError.bundle("\(Golden.file): \(name).ids has ids out of bounds")
        }
        return Expectation(
            k: k,
            ids: ids,
            logp: try words("\(name).logp", "float32", [positions, k]).map { Float(bitPattern: $0) },
            rest: try words("\(name).rest", "float32", [positions]).map { Float(bitPattern: $0) }
        )
    }

    /// The array called `name`, as words of four bytes.
    private func words(_ name: String, _ dtype: String, _ shape: [Int]) throws -> [UInt32] {
        let entry: JsonObject = try json.object("arrays").object(name)
        let path: String = Golden.directory + "/" + (try entry.string("file"))
        let found: [Int] = try entry.ints("shape")
        if try entry.string("dtype") != dtype || found != shape {
            throw EdgeLlamaError.bundle("\(Golden.file): \(name) is not \(dtype) \(shape)")
        }
        let recorded: String = try entry.string("sha256")
        guard bundle.has(path), try bundle.sha256(path) == recorded else {
            throw EdgeLlamaError.bundle("\(Golden.file): \(path) is not the array that was written")
        }
        let bytes: [UInt8] = try bundle.bytes(path)
        let count: Int = shape.reduce(1, *)
        if bytes.count != 4 * count { throw EdgeLlamaError.bundle("\(Golden.file): \(path) has \(bytes.count) bytes") }
        var words: [UInt32] = []
        words.reserveCapacity(count)
        for at in stride(from: 0, to: bytes.count, by: 4) {
            let low: UInt32 = UInt32(bytes[at]) | UInt32(bytes[at + 1]) << 8
            let high: UInt32 = UInt32(bytes[at + 2]) | UInt32(bytes[at + 3]) << 8
            words.append(low | high << 16)
        }
        return words
    }

    private static func sequence(_ json: JsonObject, _ bundle: ModelBundle) throws -> GoldenSequence {
        let sequence: GoldenSequence = GoldenSequence(
            name: try json.string("name"),
            text: try json.string("text"),
            addSpecialTokens: try json.bool("add_special_tokens"),
            messages: json.isNull("messages") ? nil : try json.objects("messages").map(message),
            tokens: try json.ints("tokens"),
            scoreFrom: try json.int("score_from")
        )
        let fits: Bool = sequence.tokens.count <= bundle.contextLength
            && sequence.tokens.indices.contains(sequence.scoreFrom)
            && !sequence.tokens.contains { $0 >= bundle.vocabSize }
        if !fits { throw EdgeLlamaError.bundle("\(file): the sequence \(sequence.name) does not fit this model") }
        return sequence
    }

    static func message(_ json: JsonObject) throws -> Message {
        let name: String = try json.string("role")
        guard let role: Role = Role(rawValue: name) else { throw EdgeLlamaError.bundle("\(file): unknown role \(name)") }
        return Message(role, try json.string("content"))
    }
}
