import Foundation
import XCTest

@testable import EdgeLlamaCore

/// Says at the n-th scored position what tests/make_vectors.py describes.
final class VectorModel: LogitsModel, @unchecked Sendable {
    let vocabSize: Int
    let contextLength: Int = 1024
    let runtime: String = "executorch vectors"
    private let scale: Double
    private let broken: Float?
    private var scored: UInt64
    var calls: [[Int]] = []

    /// broken: what the model computes for its most probable token at the third position.
    init(scale: Double, broken: Float? = nil, size: Int = 512, start: UInt64 = 0) {
        vocabSize = size
        scored = start
        self.scale = scale
        self.broken = broken
    }

    func forward(_ tokens: [Int], at position: Int) throws -> [Float] {
        calls.append([position, tokens.count])
        var values: SplitMix = SplitMix(seed: 1000 + scored)
        scored += 1
        var base: [Double] = []
        for _ in 0..<vocabSize { base.append(12 * values.uniform() - 6) }
        var logits: [Float] = []
        for id in 0..<vocabSize { logits.append(Float(base[id] + scale * (values.uniform() - 0.5))) }
        if let broken: Float = broken, scored == 3 { logits[try Sampler.best(logits)] = broken }
        return logits
    }
}

final class GoldenCheckTests: XCTestCase {
    private func run(
        _ model: VectorModel, bundle: ModelBundle? = nil, tokenizer: Tokenizer? = nil, kind: String = "x86-64",
        clock: NanoClock = .system
    ) throws -> GoldenResult {
        let bundle: ModelBundle = try bundle ?? Vectors.bundle()
        let check: GoldenCheck = try GoldenCheck(bundle: bundle, target: "xnnpack", kind: kind, clock: clock)
        // What run throws is for the test to judge, and XCTUnwrap would call it a failure.
        let result: GoldenResult? = try check.run(model, tokenizer: try tokenizer ?? bundle.tokenizer())
        return try XCTUnwrap(result)
    }

    private func assertClose(_ expected: Double, _ found: Double, _ what: String) {
        XCTAssertLessThanOrEqual(abs(expected - found), 1e-9 + 1e-6 * expected, "\(what): \(expected), found \(found)")
    }

    func testComesToPythonsNumbersAndVerdicts() throws {
        let cases: [JsonObject] = try Vectors.json("golden.json").objects("cases")
        XCTAssertEqual(Set(try cases.map { try $0.string("verdict") }), ["pass", "fail"])
        for item in cases {
            let name: String = try item.string("name")
            let model: VectorModel = VectorModel(scale: try item.double("scale"))
            let found: GoldenResult = try run(model, kind: try item.string("processor"))
            XCTAssertEqual(found.family, try item.stringOrNil("family"), name)
            XCTAssertEqual(found.passed ? "pass" : "fail", try item.string("verdict"), name)
            assertClose(try item.double("kl_mean"), found.klMean, name)
            assertClose(try item.double("parity_kl_mean"), found.parityKlMean, name)
            XCTAssertEqual(found.top1, try item.double("top1_agreement"), accuracy: 1e-12)
            XCTAssertEqual(found.parityTop1, try item.double("parity_top1_agreement"), accuracy: 1e-12)
            let sequences: [JsonObject] = try item.objects("sequences")
            XCTAssertEqual(sequences.count, found.sequences.count)
            for (expected, sequence) in zip(sequences, found.sequences) {
                XCTAssertEqual(sequence.name, try expected.string("name"))
                XCTAssertTrue(sequence.tokensMatch, sequence.name)
                let kl: [Double] = try expected.doubles("kl")
                let parity: [Double] = try expected.doubles("parity_kl")
                XCTAssertEqual([kl.count, parity.count], [sequence.kl.count, sequence.parityKl.count])
                for (e, f) in zip(kl + parity, sequence.kl + sequence.parityKl) { assertClose(e, f, sequence.name) }
                XCTAssertEqual(sequence.top1, try Vectors.bools(expected, "top1"))
                XCTAssertEqual(sequence.parityTop1, try Vectors.bools(expected, "parity_top1"))
            }
        }
    }

    func testFeedsPrefillThenSingleTokens() throws {
        let model: VectorModel = VectorModel(scale: 0)
        _ = try run(model)
        var expected: [[Int]] = []
        for sequence in try Golden(try Vectors.bundle()).sequences {
            expected.append([0, sequence.scoreFrom + 1])
            for position in (sequence.scoreFrom + 1)..<sequence.tokens.count { expected.append([position, 1]) }
        }
        XCTAssertEqual(model.calls, expected)
    }

    func testTheLogHoldsEverything() throws {
        let expected: JsonObject = try Vectors.json("golden.json")
        // The host holds the system's clock for implausible, which sees no time pass here.
        let result: GoldenResult = try run(VectorModel(scale: 0.02), clock: Ticks().clock)
        let json: String = result.json(device: Device(name: "d", os: "o"), loadMillis: 12.5, peakBytes: 1000)
        let log: JsonObject = try JsonObject.parse(Array(json.utf8), name: "log")
        XCTAssertEqual(try log.string("schema"), "edgellama.device/1")
        XCTAssertEqual(try log.string("artifact_sha256"), try expected.string("artifact_sha256"))
        XCTAssertEqual(try log.string("golden_sha256"), try expected.string("golden_sha256"))
        XCTAssertEqual(try log.string("verdict"), "pass")
        XCTAssertEqual(try log.string("family"), "per-block")
        XCTAssertEqual(try log.objects("sequences").count, result.sequences.count)
        XCTAssertEqual(try log.int("peak_bytes"), 1000)
        XCTAssertEqual(
            try log.objects("checks").map { try $0.string("name") },
            ["artifact", "tokenizer", "parity_kl", "parity_kl_sequence"]
        )
        // Where tests/apps/test_ios_core.py asks for it, to be judged by Python.
        if let place: String = ProcessInfo.processInfo.environment["EDGELLAMA_DEVICE_LOG"] {
            try json.write(toFile: place, atomically: true, encoding: .utf8)
        }
    }

    func testWhatIsNoNumberFails() throws {
        for broken in [Float.nan, Float.infinity, -Float.infinity] {
            let result: GoldenResult = try run(VectorModel(scale: 0, broken: broken))
            XCTAssertFalse(result.passed, "\(broken)")
            let json: String = result.json(device: Device(name: "d", os: "o"), loadMillis: nil, peakBytes: nil)
            let log: JsonObject = try JsonObject.parse(Array(json.utf8), name: "log")
            XCTAssertEqual(try log.string("verdict"), "fail")
            XCTAssertTrue(log.isNull("peak_bytes"))
        }
    }

    func testAnotherTokenizerFails() throws {
        let result: GoldenResult = try run(VectorModel(scale: 0), tokenizer: try Vectors.tokenizer("llama3"))
        XCTAssertEqual(result.checks.filter { !$0.passed }.map { $0.name }, ["tokenizer"])
    }

    func testLogitsOfAnotherSizeAreAnError() throws {
        let directory: URL = try copyOfBundle()
        try edit(directory.appendingPathComponent("manifest.json"), "\"vocab_size\": 512", "\"vocab_size\": 513")
        let bundle: ModelBundle = try ModelBundle(directory)
        assertFails("512 logits") { _ = try run(VectorModel(scale: 0), bundle: bundle) }
    }

    func testCanBeStopped() throws {
        let bundle: ModelBundle = try Vectors.bundle()
        var asked: Int = 0
        let result: GoldenResult? = try GoldenCheck(bundle: bundle, target: "xnnpack", kind: "x86-64").run(
            VectorModel(scale: 0), tokenizer: try bundle.tokenizer(),
            stopped: {
                asked += 1
                return asked > 5
            }
        )
        XCTAssertNil(result)
    }

    func testStreamsOnAWorker() async throws {
        let bundle: ModelBundle = try Vectors.bundle()
        let check: GoldenCheck = try GoldenCheck(bundle: bundle, target: "xnnpack", kind: "x86-64")
        var done: Int = 0
        var result: GoldenResult? = nil
        for try await event in check.stream(VectorModel(scale: 0), tokenizer: try bundle.tokenizer(), on: Worker()) {
            switch event {
            case .progress(let count, _): done = count
            case .finished(let found): result = found
            }
        }
        XCTAssertEqual(done, check.positions)
        XCTAssertEqual(result?.passed, true)
    }

    func testDamagedVectorsAreRefused() throws {
        let directory: URL = try copyOfBundle()
        let file: URL = directory.appendingPathComponent("golden/xnnpack.ids.bin")
        var data: Data = try Data(contentsOf: file)
        data[0] = data[0] &+ 1
        try data.write(to: file)
        let bundle: ModelBundle = try ModelBundle(directory)
        assertFails("hash differs") { _ = try run(VectorModel(scale: 0), bundle: bundle) }
        try Data("{}".utf8).write(to: directory.appendingPathComponent("golden/golden.json"))
        assertFails("golden.json") { _ = try run(VectorModel(scale: 0), bundle: bundle) }
    }
}
