import Foundation

/// The one queue on which models are loaded and run: a call of a model may take seconds, and would hold a thread of
/// Swift's own pool for as long.
public final class Worker: Sendable {
    private let queue: DispatchQueue = DispatchQueue(label: "edgellama.worker", qos: .userInitiated)

    public init() {}

    /// What `work` returns, after what was asked before.
    public func run<T: Sendable>(_ work: @escaping @Sendable () throws -> T) async throws -> T {
        try await withCheckedThrowingContinuation { (continuation: CheckedContinuation<T, any Error>) in
            queue.async {
                continuation.resume(with: Result(catching: work))
            }
        }
    }

    /// What `work` gives to its first argument, one after the other. Its second says whether nobody listens any more:
    /// the task that iterates was cancelled, or the stream was dropped.
    public func stream<Event: Sendable>(
        _ work: @escaping @Sendable (_ emit: (Event) -> Void, _ stopped: () -> Bool) throws -> Void
    ) -> AsyncThrowingStream<Event, any Error> {
        let queue: DispatchQueue = self.queue
        return AsyncThrowingStream { (continuation: AsyncThrowingStream<Event, any Error>.Continuation) in
            let flag: StopFlag = StopFlag()
            continuation.onTermination = { _ in flag.set() }
            queue.async {
                do {
                    try work({ continuation.yield($0) }, { flag.isSet })
                    continuation.finish()
                } catch {
                    continuation.finish(throwing: error)
                }
            }
        }
    }
}

/// Says once, to any thread, that something should end.
public final class StopFlag: @unchecked Sendable {
    private let lock: NSLock = NSLock()
    private var value: Bool = false

    public init() {}

    public var isSet: Bool {
        lock.lock()
        defer { lock.unlock() }
        return value
    }

    public func set() {
        lock.lock()
        defer { lock.unlock() }
        value = true
    }
}
