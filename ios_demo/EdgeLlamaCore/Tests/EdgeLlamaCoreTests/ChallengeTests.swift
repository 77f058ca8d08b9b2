import Foundation
import XCTest

@testable import EdgeLlamaCore

final class ChallengeTests: XCTestCase {
    /// The challenge of the vectors, as a file of its own.
    private func text() throws -> String {
        let whole: Json = try Json.parse(try Vectors.bytes("challenge.json"))
        guard case .object(let members) = whole else { throw JsonError(message: "challenge.json is not an object") }
        return try XCTUnwrap(members.first { $0.name == "challenge" }).value.written()
    }

    private func parse(_ text: String) throws -> Challenge {
        try Challenge(Array(text.utf8), name: "challenge.json", bundle: try Vectors.bundle(), target: "xnnpack")
    }

    private func run(_ model: VectorModel) throws -> Response {
        let response: Response? = try ChallengeRun(
            bundle: try Vectors.bundle(), challenge: try parse(try text())
        ).run(model)
        return try XCTUnwrap(response)
    }

    private func numbers(_ rows: [Json]) throws -> [[Double]] {
        try rows.map { (row: Json) -> [Double] in
            guard case .array(let items) = row else { throw JsonError(message: "not a list") }
            return try items.map { (item: Json) -> Double in
                switch item {
                case .int(let value): return Double(value)
                case .double(let value): return value
                default: throw JsonError(message: "not a number")
                }
            }
        }
    }

    private func assertClose(_ expected: [Double], _ found: [Double?]) throws {
        XCTAssertEqual(expected.count, found.count)
        for (e, f) in zip(expected, found) { XCTAssertEqual(e, try XCTUnwrap(f), accuracy: 1e-9 * (1 + abs(e))) }
    }

    func testGivesPythonsAnswers() throws {
        let cases: [JsonObject] = try Vectors.json("challenge.json").objects("cases")
        XCTAssertGreaterThanOrEqual(cases.count, 2)
        for item in cases {
            let found: Response = try run(VectorModel(scale: try item.double("scale")))
            let sequences: [JsonObject] = try item.objects("sequences")
            XCTAssertEqual(sequences.count, found.answers.count)
            for (expected, rows) in zip(sequences, found.answers) {
                let ids: [[Double]] = try numbers(try expected.array("ids"))
                XCTAssertEqual(ids, rows.map { $0.ids.map { Double($0) } })
                let logp: [[Double]] = try numbers(try expected.array("logp"))
                for (e, row) in zip(logp, rows) { try assertClose(e, row.logp) }
                try assertClose(try expected.doubles("rest"), rows.map { $0.rest })
            }
        }
    }

    func testTheResponseHoldsEverything() throws {
        let challenge: Challenge = try parse(try text())
        let response: Response = try run(VectorModel(scale: 0.02))
        let json: String = response.json(device: Device(name: "Maker", os: "o"), loadMillis: 12.5, peakBytes: 1000)
        let log: JsonObject = try JsonObject.parse(Array(json.utf8), name: "response")
        XCTAssertEqual(try log.string("schema"), "edgellama.response/1")
        XCTAssertEqual(try log.string("nonce"), challenge.nonce)
        XCTAssertEqual(try log.string("artifact_sha256"), try Vectors.bundle().artifactSha256("xnnpack"))
        XCTAssertEqual(try log.string("device"), "Maker")
        let sequences: [JsonObject] = try log.objects("sequences")
        XCTAssertEqual(try sequences.map { try $0.string("name") }, challenge.sequences.map { $0.name })
        XCTAssertEqual(try sequences.reduce(0) { $0 + (try $1.array("ids")).count }, challenge.positions)
        XCTAssertEqual(try log.int("peak_bytes"), 1000)
        // Where tests/apps/test_ios_core.py asks for it, to be read by Python.
        if let place: String = ProcessInfo.processInfo.environment["EDGELLAMA_RESPONSE"] {
            try json.write(toFile: place, atomically: true, encoding: .utf8)
        }
    }

    func testFeedsPrefillThenSingleTokens() throws {
        let model: VectorModel = VectorModel(scale: 0)
        _ = try run(model)
        var expected: [[Int]] = []
        for sequence in try parse(try text()).sequences {
            expected.append([0, sequence.scoreFrom + 1])
            for position in (sequence.scoreFrom + 1)..<sequence.tokens.count { expected.append([position, 1]) }
        }
        XCTAssertEqual(model.calls, expected)
    }

    func testCanBeStopped() throws {
        var asked: Int = 0
        let response: Response? = try ChallengeRun(
            bundle: try Vectors.bundle(), challenge: try parse(try text())
        ).run(
            VectorModel(scale: 0),
            stopped: {
                asked += 1
                return asked > 5
            }
        )
        XCTAssertNil(response)
    }

    func testStreamsOnAWorker() async throws {
        let challenge: Challenge = try parse(try text())
        let answering: ChallengeRun = ChallengeRun(bundle: try Vectors.bundle(), challenge: challenge)
        var done: Int = 0
        var response: Response? = nil
        for try await event in answering.stream(VectorModel(scale: 0), on: Worker()) {
            switch event {
            case .progress(let count): done = count
            case .finished(let found): response = found
            }
        }
        XCTAssertEqual(done, challenge.positions)
        XCTAssertEqual(response?.answers.count, challenge.sequences.count)
    }

    func testBrokenLogitsAreNulls() {
        for broken in [Float.nan, Float.infinity, -Float.infinity] {
            let found: TopTokens = TopTokens([1, broken, 0], 2)
            XCTAssertEqual(found.ids, [0, 1])
            XCTAssertEqual(found.logp, [nil, nil])
            XCTAssertNil(found.rest)
        }
    }

    func testEqualLogitsAreInTheOrderOfTheirIds() {
        XCTAssertEqual(TopTokens([1, 3, 3, 2, -2000], 3).ids, [1, 2, 3])
        XCTAssertNotNil(TopTokens([1, 3, 3, 2, -2000], 3).rest)
        XCTAssertNil(TopTokens([1, 3, -2000], 2).rest, "zero has no logarithm")
    }

    func testRefusesWhatItCannotAnswer() throws {
        let content: String = try text()
        let sha256: String = try Vectors.bundle().artifactSha256("xnnpack")
        for (old, new, words) in [
            ("edgellama.challenge/1", "edgellama.challenge/2", "this app reads"),
            ("\"target\": \"xnnpack\"", "\"target\": \"coreml\"", "about the target coreml"),
            (sha256, String(repeating: "0", count: 64), "another artifact"),
            ("\"top_k\": 8", "\"top_k\": 512", "asks for 512 tokens"),
            ("\"score_from\": 0", "\"score_from\": 400", "does not fit"),
        ] {
            let range: Range<String.Index> = try XCTUnwrap(content.range(of: old), old)
            assertFails(words) { _ = try parse(content.replacingCharacters(in: range, with: new)) }
        }
        assertFails("not an object") { _ = try parse("[]") }
    }
}
