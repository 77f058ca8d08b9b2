import XCTest

@testable import EdgeLlamaCore

/// Answers every token with the next id, and keeps what it was fed.
final class CountingModel: LogitsModel, @unchecked Sendable {
    let vocabSize: Int = 512
    let contextLength: Int = 64
    let runtime: String = "counting"
    var fed: [[Int]] = []
    var cache: [Int] = []

    func forward(_ tokens: [Int], at position: Int) throws -> [Float] {
        precondition(position <= cache.count && position + tokens.count <= contextLength)
        fed.append(tokens)
        cache = Array(cache[..<position]) + tokens
        var logits: [Float] = [Float](repeating: 0, count: vocabSize)
        logits[(tokens[tokens.count - 1] + 1) % vocabSize] = 9
        return logits
    }
}

/// A clock that goes on by a millisecond whenever it is read.
final class Ticks: @unchecked Sendable {
    private var now: UInt64 = 0
    private let lock: NSLock = NSLock()

    var clock: NanoClock {
        NanoClock {
            self.lock.lock()
            defer { self.lock.unlock() }
            self.now += 1_000_000
            return self.now
        }
    }
}

final class GeneratorTests: XCTestCase {
    private let model: CountingModel = CountingModel()
    private lazy var session: Session = Session(model)

    private func generator(_ stop: Set<Int> = [], clock: NanoClock = .system) throws -> Generator {
        Generator(session: session, tokenizer: try Vectors.tokenizer("smollm2"), stopIds: stop, clock: clock)
    }

    func testEndsAtAStopTokenWhichIsNoText() throws {
        var text: String = ""
        let found: Generated = try generator([44]).generate(
            [40], sampler: .greedy, maxTokens: 20, onText: { (piece: String, _: Int) in text += piece }
        )
        XCTAssertEqual(found.ids, [41, 42, 43, 44])
        XCTAssertEqual(found.finish, .stop)
        XCTAssertEqual(text, try Vectors.tokenizer("smollm2").decode([41, 42, 43]))
        XCTAssertEqual(model.cache, [40, 41, 42, 43])
    }

    func testEndsAtTheLimitAndAtTheEndOfTheContext() throws {
        XCTAssertEqual(try generator().generate([40], sampler: .greedy, maxTokens: 3).finish, .length)
        let found: Generated = try generator().generate(Array(40..<100), sampler: .greedy, maxTokens: 100)
        XCTAssertEqual(found.finish, .context)
        XCTAssertEqual(found.ids.count, 5)  // four that fit, and one that follows the last
        let generator: Generator = try generator()
        assertFails("65 tokens") {
            _ = try generator.generate([Int](repeating: 1, count: 65), sampler: .greedy, maxTokens: 1)
        }
    }

    func testStopsWhenAsked() throws {
        var count: Int = 0
        let found: Generated = try generator().generate(
            [40], sampler: .greedy, maxTokens: 50, stopped: { count >= 3 }, onText: { count = $1 }
        )
        XCTAssertEqual(found.finish, .stopped)
        XCTAssertEqual(found.ids.count, 3)
        let none: Generated = try generator().generate([9], sampler: .greedy, maxTokens: 5, stopped: { true })
        XCTAssertEqual(none.ids, [])
    }

    func testTheCacheGoesOnWhereTheTextDoes() throws {
        let first: Generated = try generator().generate([10, 11, 12], sampler: .greedy, maxTokens: 3)  // 13, 14, 15
        model.fed = []
        let next: Generated = try generator().generate(
            [10, 11, 12, 13, 14, 15, 30, 31], sampler: .greedy, maxTokens: 1
        )
        XCTAssertEqual(model.fed, [[15, 30, 31]], "the last token was never fed")
        XCTAssertEqual(next.stats.cachedTokens, 5)
        XCTAssertEqual(first.stats.cachedTokens, 0)
        model.fed = []
        _ = try generator().generate([10, 99, 12], sampler: .greedy, maxTokens: 1)
        XCTAssertEqual(model.fed, [[10, 99, 12]], "another text starts over")
        model.fed = []
        _ = try generator().generate([10, 99, 12], sampler: .greedy, maxTokens: 1)
        XCTAssertEqual(model.fed, [[10, 99, 12]], "the same prompt again is fed again")
    }

    func testMeasuresPrefillAndDecode() throws {
        let stats: Stats = try generator(clock: Ticks().clock).generate([1, 2, 3], sampler: .greedy, maxTokens: 4).stats
        XCTAssertEqual(stats.promptTokens, 3)
        XCTAssertEqual(stats.generatedTokens, 4)
        XCTAssertEqual(stats.prefillRate, 3 * 1e9 / 1_000_000)
        XCTAssertGreaterThan(stats.firstTokenMillis, 0)
        XCTAssertNotNil(stats.decodeRate)
    }

    func testStreamsOnAWorker() async throws {
        var text: String = ""
        var last: Generated? = nil
        let worker: Worker = Worker()
        for try await event in try generator([44]).stream([40], sampler: .greedy, maxTokens: 20, on: worker) {
            switch event {
            case .text(let piece, _): text += piece
            case .finished(let found): last = found
            }
        }
        XCTAssertEqual(last?.ids, [41, 42, 43, 44])
        XCTAssertEqual(text, try Vectors.tokenizer("smollm2").decode([41, 42, 43]))
        let failing: AsyncThrowingStream<GenerationEvent, any Error> = try generator().stream(
            [Int](repeating: 1, count: 65), sampler: .greedy, maxTokens: 1, on: worker
        )
        do {
            for try await _ in failing { XCTFail("no event is due") }
            XCTFail("an error is due")
        } catch let error as EdgeLlamaError {
            XCTAssertEqual(error.kind, .context)
        }
        let answer: Int = try await worker.run { 7 }
        XCTAssertEqual(answer, 7)
    }

    func testWhoStopsListeningStopsTheWork() async throws {
        let worker: Worker = Worker()
        let ended: StopFlag = StopFlag()
        let task: Task<Void, any Error> = Task {
            let stream: AsyncThrowingStream<Int, any Error> = worker.stream { emit, stopped in
                while !stopped() {
                    emit(1)
                    usleep(100)
                }
                ended.set()
            }
            for try await _ in stream {}
        }
        try await Task.sleep(nanoseconds: 5_000_000)
        task.cancel()
        _ = try? await task.value
        // The queue runs this only when what it ran before has ended.
        let hasEnded: Bool = try await worker.run { ended.isSet }
        XCTAssertTrue(hasEnded)
    }

    func testBenchmarksGiveMedianAndRange() throws {
        var runs: Int = 0
        let plan: BenchmarkPlan = BenchmarkPlan(promptTokens: 8, decodeTokens: 4, warmUps: 1, runs: 3)
        let benchmark: Benchmark = Benchmark(model: model, target: "xnnpack", clock: Ticks().clock)
        let result: BenchmarkResult = try XCTUnwrap(try benchmark.run(plan, text: [5, 6, 7], onRun: { runs = $0 }))
        XCTAssertEqual(runs, 4)
        XCTAssertEqual(result.prefillRate.median, 8 * 1e9 / 1_000_000)
        let json: String = try result.json(
            bundle: try Vectors.bundle(), device: Device(name: "d", os: "o"), loadMillis: 1,
            extra: ["thermal_state": .string("nominal")]
        )
        let read: JsonObject = try JsonObject.parse(Array(json.utf8), name: "benchmark")
        XCTAssertEqual(try read.int("prompt_tokens"), 8)
        XCTAssertEqual(try read.string("thermal_state"), "nominal")
        XCTAssertEqual(Figure([4, 1, 2, 3]).median, 2.5)
        assertFails("120 tokens") {
            _ = try benchmark.run(BenchmarkPlan(promptTokens: 60, decodeTokens: 60), text: [1])
        }
        assertFails("nothing to measure") { _ = try benchmark.run(BenchmarkPlan(runs: 0), text: [1]) }
    }
}
