/// An artifact that runs: Core ML or ExecuTorch on a device, anything else in tests.
///
/// Not for use by several threads at once: whoever holds one calls it on one `Worker`. (Conforming classes are
/// `@unchecked Sendable` for that reason.)
public protocol LogitsModel: AnyObject, Sendable {
    var vocabSize: Int { get }
    /// Number of logits of a position, fewer than the vocabulary in a classifier.
    var outputSize: Int { get }
    var contextLength: Int { get }

    /// What computes, with its version, as device logs name it.
    var runtime: String { get }

    /// Logits after the last of `tokens`, which join the KV cache from `position` on; what the cache held from there
    /// on is overwritten.
    func forward(_ tokens: [Int], at position: Int) throws -> [Float]
}

extension LogitsModel {
    public var outputSize: Int { vocabSize }
}

/// A model with the tokens in its KV cache. Of one `Worker`, as its model is.
public final class Session: @unchecked Sendable {
    /// Tokens of one call: between calls a person can stop.
    static let piece: Int = 512

    public let model: any LogitsModel
    private var cached: [Int] = []

    /// Number of tokens that the last `feed` found in the cache.
    public private(set) var reused: Int = 0

    public init(_ model: any LogitsModel) {
        self.model = model
    }

    /// Number of tokens in the cache.
    public var position: Int { cached.count }

    /// Makes the cache hold `tokens` and returns the logits after the last. If it holds their beginning, only the rest
    /// is fed; in pieces, between which `stopped` is asked. Nil when that said so.
    public func feed(_ tokens: [Int], stopped: () -> Bool = { false }) throws -> [Float]? {
        precondition(!tokens.isEmpty, "no tokens to feed")
        if tokens.count > model.contextLength {
            throw EdgeLlamaError.context(
                "the text has \(tokens.count) tokens, and the context of this model holds \(model.contextLength)"
            )
        }
        let continues: Bool = position < tokens.count && tokens.starts(with: cached)
        if !continues { reset() }
        reused = position
        var logits: [Float]? = nil
        while position < tokens.count {
            if stopped() { return nil }
            let end: Int = min(position + Session.piece, tokens.count)
            logits = try push(Array(tokens[position..<end]))
        }
        return logits
    }

    /// Feeds `tokens` after those in the cache: the logits after the last.
    public func push(_ tokens: [Int]) throws -> [Float] {
        let logits: [Float] = try model.forward(tokens, at: position)
        cached += tokens
        return logits
    }

    /// Forgets all tokens.
    public func reset() {
        cached = []
    }
}
