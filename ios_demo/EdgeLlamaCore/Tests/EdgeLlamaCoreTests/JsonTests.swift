import XCTest

@testable import EdgeLlamaCore

final class JsonTests: XCTestCase {
    private func parse(_ text: String) throws -> Json { try Json.parse(Array(text.utf8)) }

    func testReadsEveryKindOfValue() throws {
        let text: String = #" {"a": [1, -2.5e3, 0, 9007199254740993], "b": {"c": null, "d": [true, false]}, "e": ""} "#
        let expected: Json = .object([
            JsonMember(name: "a", value: .array([.int(1), .double(-2500), .int(0), .int(9_007_199_254_740_993)])),
            JsonMember(
                name: "b",
                value: .object([
                    JsonMember(name: "c", value: .null),
                    JsonMember(name: "d", value: .array([.bool(true), .bool(false)])),
                ])
            ),
            JsonMember(name: "e", value: .string("")),
        ])
        XCTAssertEqual(try parse(text), expected)
        XCTAssertEqual(
            try parse(#""\"\\\/\b\f\n\r\t\u00e9\ud83d\ude42🙂""#), .string("\"\\/\u{8}\u{c}\n\r\té🙂🙂")
        )
        XCTAssertEqual(try parse("1e300"), .double(1e300))
        XCTAssertEqual(try parse("12345678901234567890123"), .double(1.2345678901234568e22))
    }

    func testRefusesWhatIsNotJson() {
        let texts: [String] = [
            "", " ", "{", "[", "[1,]", "{\"a\":}", "{\"a\" 1}", "{a: 1}", "nul", "tru", "01", "1.", ".5", "+1", "-", "1e",
            "NaN", "Infinity", "\"", "\"\\x\"", "\"\\u12g4\"", "\"\n\"", "[1] 2", "'a'", "\"\\u12", "\"\\ud83d\"",
            "\"\\ude42\"", "\"\\ud83d\\u0041\"", String(repeating: "[", count: 100_000),
        ]
        for text in texts { XCTAssertThrowsError(try parse(text), String(text.prefix(20))) }
        XCTAssertThrowsError(try Json.parse([0x22, 0xff, 0x22]), "not UTF-8")
    }

    func testWritesWhatItReads() throws {
        let value: Json = .object([
            "b": .array([.int(1), .double(0.1), .bool(true), .null, .string("\"\\\n\u{1}é🙂"), .double(1e-7)]),
            "a": .object([:]),
            "c": .array([]),
        ])
        let text: String = value.written()
        XCTAssertEqual(try parse(text).written(), text)
        XCTAssertTrue(text.hasPrefix("{\n  \"a\": {},\n  \"b\": [\n    1,\n"), text)
        XCTAssertEqual(Json.array([.double(.nan), .double(.infinity)]).written(), "[\n  null,\n  null\n]\n")
    }

    func testNamesThatOnlyLookEqualStayApart() throws {
        guard case .object(let members) = try parse("{\"\u{e9}\": 1, \"e\u{301}\": 2}") else { return XCTFail("no object") }
        XCTAssertEqual(members.map { Array($0.name.utf8).count }, [2, 3])
    }
}
