/// What a benchmark runs: prefill of `promptTokens`, then `decodeTokens` single steps; `warmUps` runs are not counted.
public struct BenchmarkPlan: Sendable {
    public var promptTokens: Int = 128
    public var decodeTokens: Int = 64
    public var warmUps: Int = 1
    public var runs: Int = 5

    public init(promptTokens: Int = 128, decodeTokens: Int = 64, warmUps: Int = 1, runs: Int = 5) {
        self.promptTokens = promptTokens
        self.decodeTokens = decodeTokens
        self.warmUps = warmUps
        self.runs = runs
    }
}

/// Median and range of a figure over the runs.
public struct Figure: Sendable {
    public let low: Double
    public let median: Double
    public let high: Double

    /// values: at least one.
    init(_ values: [Double]) {
        let sorted: [Double] = values.sorted()
        low = sorted[0]
        high = sorted[sorted.count - 1]
        median = (sorted[sorted.count / 2] + sorted[(sorted.count - 1) / 2]) / 2
    }

    var json: Json { .object(["median": .double(median), "min": .double(low), "max": .double(high)]) }
}

public struct BenchmarkResult: Sendable {
    public static let schema: String = "edgellama.benchmark/1"

    public let plan: BenchmarkPlan
    public let target: String
    public let runtime: String
    public let prefillRate: Figure
    public let decodeRate: Figure
    public let firstTokenMillis: Figure

    /// Schema edgellama.benchmark/1. extra: figures that only the app can read, such as memory and temperature.
    public func json(
        bundle: ModelBundle, device: Device, loadMillis: Double?, extra: [String: Json]
    ) throws -> String {
        let members: [String: Json] = [
            "schema": .string(BenchmarkResult.schema),
            "bundle": .string(bundle.name),
            "recipe": .string(bundle.recipe),
            "target": .string(target),
            "artifact_sha256": .string(try bundle.artifactSha256(target)),
            "device": .string(device.name),
            "os": .string(device.os),
            "runtime": .string(runtime),
            "prompt_tokens": .int(plan.promptTokens),
            "decode_tokens": .int(plan.decodeTokens),
            "warm_ups": .int(plan.warmUps),
            "runs": .int(plan.runs),
            "prefill_tok_s": prefillRate.json,
            "decode_tok_s": decodeRate.json,
            "first_token_ms": firstTokenMillis.json,
            "load_ms": Json.number(loadMillis),
        ]
        return Json.object(members.merging(extra) { own, _ in own }).written()
    }
}

public enum BenchmarkEvent: Sendable {
    /// How many runs are done, those to warm up among them.
    case run(Int)
    case finished(BenchmarkResult)
}

/// Measures prefill and decode. Any text does: time does not depend on the tokens.
public struct Benchmark: Sendable {
    private let model: any LogitsModel
    private let target: String
    private let clock: NanoClock

    public init(model: any LogitsModel, target: String, clock: NanoClock = .system) {
        self.model = model
        self.target = target
        self.clock = clock
    }

    /// Runs `plan` on the worker that the model belongs to. Who stops listening stops it.
    public func stream(
        _ plan: BenchmarkPlan, text: [Int], on worker: Worker
    ) -> AsyncThrowingStream<BenchmarkEvent, any Error> {
        worker.stream { (emit: (BenchmarkEvent) -> Void, stopped: () -> Bool) in
            let result: BenchmarkResult? = try run(plan, text: text, stopped: stopped) { emit(.run($0)) }
            if let result: BenchmarkResult = result { emit(.finished(result)) }
        }
    }

    /// Runs `plan` on `text`, repeated as needed. Nil when `stopped` said so.
    public func run(
        _ plan: BenchmarkPlan, text: [Int], stopped: () -> Bool = { false }, onRun: (Int) -> Void = { _ in }
    ) throws -> BenchmarkResult? {
        if plan.promptTokens < 1 || plan.decodeTokens < 1 || plan.warmUps < 0 || plan.runs < 1 || text.isEmpty {
            throw EdgeLlamaError(.settings, "nothing to measure in \(plan)", remedy: "Give at least one token and one run.")
        }
        let count: Int = plan.promptTokens + plan.decodeTokens
        if count > model.contextLength {
            throw EdgeLlamaError.context("the benchmark needs \(count) tokens, the context holds \(model.contextLength)")
        }
        let tokens: [Int] = (0..<count).map { text[$0 % text.count] }
        var prefill: [Double] = []
        var decode: [Double] = []
        var first: [Double] = []
        for run in 0..<plan.warmUps + plan.runs {
            if stopped() { return nil }
            let start: UInt64 = clock.nanos()
            _ = try Sampler.best(try model.forward(Array(tokens[..<plan.promptTokens]), at: 0))
            let middle: UInt64 = clock.nanos()
            for i in plan.promptTokens..<count {
                if stopped() { return nil }
                _ = try Sampler.best(try model.forward([tokens[i]], at: i))
            }
            let end: UInt64 = clock.nanos()
            if run >= plan.warmUps {
                prefill.append(Double(plan.promptTokens) * 1e9 / Double(middle - start))
                decode.append(Double(plan.decodeTokens) * 1e9 / Double(end - middle))
                first.append(Double(middle - start) / 1e6)
            }
            onRun(run + 1)
        }
        return BenchmarkResult(
            plan: plan,
            target: target,
            runtime: model.runtime,
            prefillRate: Figure(prefill),
            decodeRate: Figure(decode),
            firstTokenMillis: Figure(first)
        )
    }
}
