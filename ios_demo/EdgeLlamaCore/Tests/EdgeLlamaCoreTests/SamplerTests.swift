import XCTest

@testable import EdgeLlamaCore

final class SamplerTests: XCTestCase {
    func testDrawsAsPython() throws {
        let cases: [JsonObject] = try Vectors.json("sampling.json").objects("cases")
        XCTAssertGreaterThan(cases.count, 5)
        for item in cases {
            let logits: [Float] = try item.doubles("logits").map { Float($0) }
            let seed: UInt64 = try XCTUnwrap(UInt64(try item.string("seed")))
            let temperature: Double = try item.double("temperature")
            var sampler: Sampler = try Sampler(temperature: temperature, topP: try item.double("top_p"), seed: seed)
            let expected: [Int] = try item.ints("tokens")
            var found: [Int] = []
            for _ in expected { found.append(try sampler.sample(logits)) }
            XCTAssertEqual(found, expected, "temperature \(temperature)")
        }
    }

    func testTheGeneratorIsPythons() throws {
        for item in try Vectors.json("sampling.json").objects("random") {
            let seed: UInt64 = try XCTUnwrap(UInt64(try item.string("seed")))
            var bits: SplitMix = SplitMix(seed: seed)
            for expected in try Vectors.strings(item, "next") { XCTAssertEqual(String(bits.next()), expected) }
            var uniform: SplitMix = SplitMix(seed: seed)
            for expected in try item.doubles("uniform") { XCTAssertEqual(uniform.uniform(), expected) }
        }
    }

    func testNegativeZeroIsZero() throws {
        var sampler: Sampler = try Sampler(temperature: 1, topP: 1e-9)
        XCTAssertEqual(try sampler.sample([0, -0.0, -1]), 0)
        XCTAssertEqual(try sampler.sample([-0.0, 0, -1]), 0)
    }

    func testNoNumbersAreAnErrorAndNoToken() throws {
        for temperature in [0.0, 1.0] {
            var sampler: Sampler = try Sampler(temperature: temperature)
            XCTAssertThrowsError(try sampler.sample([1, .nan, 0]))
        }
    }

    func testSettingsWithoutAMeaningAreRefused() {
        for temperature in [-0.1, 101, .nan] { XCTAssertThrowsError(try Sampler(temperature: temperature)) }
        for topP in [0, 1.1, .nan] { XCTAssertThrowsError(try Sampler(temperature: 1, topP: topP)) }
    }
}
