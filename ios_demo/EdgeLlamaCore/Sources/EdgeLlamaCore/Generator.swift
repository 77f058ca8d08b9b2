import Foundation

/// Nanoseconds that only go forward; the system's clock, or a test's.
public struct NanoClock: Sendable {
    public let nanos: @Sendable () -> UInt64

    public init(_ nanos: @escaping @Sendable () -> UInt64) {
        self.nanos = nanos
    }

    public static let system: NanoClock = NanoClock { DispatchTime.now().uptimeNanoseconds }
}

/// Why a text ended.
public enum Finish: String, Sendable {
    case stop = "stop token"
    case length = "length"
    case context = "the context is full"
    case stopped = "stopped"
}

/// Tokens and times of one answer.
public struct Stats: Equatable, Sendable {
    public let promptTokens: Int
    public let cachedTokens: Int
    public let generatedTokens: Int
    public let prefillNanos: UInt64
    public let firstTokenNanos: UInt64
    public let decodeNanos: UInt64

    /// Tokens per second of the prompt's tokens that were not in the cache; nil for none.
    public var prefillRate: Double? { rate(promptTokens - cachedTokens, prefillNanos) }

    /// Tokens per second; the first token comes from prefill and is not counted.
    public var decodeRate: Double? { rate(generatedTokens - 1, decodeNanos) }

    /// Milliseconds from the request to the first token.
    public var firstTokenMillis: Double { Double(firstTokenNanos) / 1e6 }
}

func rate(_ tokens: Int, _ nanos: UInt64) -> Double? {
    tokens > 0 && nanos > 0 ? Double(tokens) * 1e9 / Double(nanos) : nil
}

public struct Generated: Sendable {
    public let ids: [Int]
    public let finish: Finish
    public let stats: Stats
}

public enum GenerationEvent: Sendable {
    /// Text that became certain, and how many tokens there are so far.
    case text(String, tokens: Int)
    case finished(Generated)
}

/// The generation loop: tokens one by one, until a stop token, a limit, the end of the context, or a person ends it.
public struct Generator: Sendable {
    private let session: Session
    private let tokenizer: Tokenizer
    private let stopIds: Set<Int>
    private let clock: NanoClock

    public init(session: Session, tokenizer: Tokenizer, stopIds: Set<Int>, clock: NanoClock = .system) {
        self.session = session
        self.tokenizer = tokenizer
        self.stopIds = stopIds
        self.clock = clock
    }

    /// Continues `prompt` on the worker that the session belongs to. Who stops listening stops it.
    public func stream(
        _ prompt: [Int], sampler: Sampler, maxTokens: Int, on worker: Worker
    ) -> AsyncThrowingStream<GenerationEvent, any Error> {
        worker.stream { (emit: (GenerationEvent) -> Void, stopped: () -> Bool) in
            let found: Generated = try generate(prompt, sampler: sampler, maxTokens: maxTokens, stopped: stopped) {
                emit(.text($0, tokens: $1))
            }
            emit(.finished(found))
        }
    }

    /// Continues `prompt`. `onText` gets pieces of text as they become certain, and how many tokens there are so far.
    /// The cache then holds the prompt and all but the last token.
    public func generate(
        _ prompt: [Int], sampler: Sampler, maxTokens: Int, stopped: () -> Bool = { false },
        onText: (String, Int) -> Void = { _, _ in }
    ) throws -> Generated {
        var sampler: Sampler = sampler
        var stream: TokenStream = tokenizer.stream()
        let start: UInt64 = clock.nanos()
        var logits: [Float]? = try session.feed(prompt, stopped: stopped)
        let prefill: UInt64 = clock.nanos() - start
        var ids: [Int] = []
        var first: UInt64 = prefill
        var finish: Finish = .stopped
        while let row: [Float] = logits {
            let id: Int = try sampler.sample(row)
            ids.append(id)
            if ids.count == 1 { first = clock.nanos() - start }
            let isStop: Bool = stopIds.contains(id)
            if !isStop { onText(stream.push(id), ids.count) }
            if isStop {
                finish = .stop
                break
            }
            if ids.count >= maxTokens {
                finish = .length
                break
            }
            if session.position == session.model.contextLength {
                finish = .context
                break
            }
            if stopped() { break }
            logits = try session.push([id])
        }
        let rest: String = stream.flush()
        if !rest.isEmpty { onText(rest, ids.count) }
        let stats: Stats = Stats(
            promptTokens: prompt.count,
            cachedTokens: session.reused,
            generatedTokens: ids.count,
            prefillNanos: prefill,
            firstTokenNanos: first,
            decodeNanos: clock.nanos() - start - first
        )
        return Generated(ids: ids, finish: finish, stats: stats)
    }
}
