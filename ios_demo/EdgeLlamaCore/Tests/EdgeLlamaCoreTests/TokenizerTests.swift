import XCTest

@testable import EdgeLlamaCore

final class TokenizerTests: XCTestCase {
    private func tokenizers() throws -> [String: Tokenizer] {
        ["smollm2": try Vectors.tokenizer("smollm2"), "llama3": try Vectors.tokenizer("llama3")]
    }

    func testEncodesAsPython() throws {
        let tokenizers: [String: Tokenizer] = try tokenizers()
        let cases: [JsonObject] = try Vectors.json("encode.json").objects("cases")
        XCTAssertGreaterThan(cases.count, 150)
        for item in cases {
            let tokenizer: Tokenizer = try XCTUnwrap(tokenizers[try item.string("tokenizer")])
            let text: String = try item.string("text")
            let what: String = Json.string(text).written()
            XCTAssertEqual(tokenizer.encode(text, addSpecialTokens: false), try item.ints("ids"), what)
            XCTAssertEqual(tokenizer.encode(text), try item.ints("ids_with_special"), what)
        }
    }

    func testCutsWordsAsPython() throws {
        let tokenizers: [String: Tokenizer] = try tokenizers()
        for item in try Vectors.json("encode.json").objects("cases") {
            let tokenizer: Tokenizer = try XCTUnwrap(tokenizers[try item.string("tokenizer")])
            let text: String = try item.string("text")
            let scalars: [Unicode.Scalar] = Array(text.unicodeScalars)
            var start: Int = 0
            var words: [[UInt32]] = []
            for end in tokenizer.preTokenizer.ends(scalars.map { $0.value }) {
                words.append(scalars[start..<end].map { $0.value })
                start = end
            }
            let expected: [[UInt32]] = try Vectors.strings(item, "words").map { (word: String) -> [UInt32] in
                word.unicodeScalars.map { $0.value }
            }
            XCTAssertEqual(words, expected, Json.string(text).written())
        }
    }

    func testDecodesAsPython() throws {
        let tokenizers: [String: Tokenizer] = try tokenizers()
        for item in try Vectors.json("decode.json").objects("cases") {
            let tokenizer: Tokenizer = try XCTUnwrap(tokenizers[try item.string("tokenizer")])
            let ids: [Int] = try item.ints("ids")
            var stream: TokenStream = tokenizer.stream()
            let pieces: [String] = try Vectors.strings(item, "pieces")
            let flush: String = try item.string("flush")
            var found: [[UInt8]] = []
            for id in ids { found.append(Array(stream.push(id).utf8)) }
            XCTAssertEqual(found, pieces.map { Array($0.utf8) })
            XCTAssertEqual(stream.flush(), flush)
            XCTAssertEqual(Array(tokenizer.decode(ids).utf8), Array((pieces.joined() + flush).utf8))
        }
    }

    func testKnowsTheClassesOfCodePoints() throws {
        let json: JsonObject = try Vectors.json("unicode.json")
        let sets: [String: CodePoints] = [
            "letter": CodePoints.letters, "number": CodePoints.numbers, "space": CodePoints.spaces,
            "digit": CodePoints.digits,
        ]
        for (name, set) in sets {
            var expected: [Bool] = [Bool](repeating: false, count: 0x110000)
            for range in try json.array(name) {
                guard case .array(let ends) = range, case .int(let first) = ends[0], case .int(let last) = ends[1] else {
                    return XCTFail("\(name) holds no ranges")
                }
                for point in first...last { expected[point] = true }
            }
            let found: [Bool] = (0..<0x110000).map { set.contains(UInt32($0)) }
            XCTAssertTrue(found == expected, name)
        }
    }

    func testMergesAsTheSlowWay() {
        var random: SplitMix = SplitMix(seed: 3)
        func draw(_ bound: UInt64) -> Int { Int(random.next() % bound) }
        for _ in 0..<300 {
            var table: [[Int]: (rank: Int, joined: Int)] = [:]
            var merges: Merges = Merges(capacity: 40)
            for rank in 0..<40 {
                let pair: [Int] = [draw(12), draw(12)]
                let joined: Int = draw(12)
                if table[pair] == nil {
                    table[pair] = (rank, joined)
                    merges.add(left: pair[0], right: pair[1], rank: rank, joined: joined)
                }
            }
            let symbols: [Int] = (0..<draw(30)).map { _ in draw(12) }
            var slow: [Int] = symbols
            while true {
                var best: Int? = nil
                for i in slow.indices.dropLast() {
                    guard let found: Int = table[[slow[i], slow[i + 1]]]?.rank else { continue }
                    if let at: Int = best, let rank: Int = table[[slow[at], slow[at + 1]]]?.rank, rank <= found { continue }
                    best = i
                }
                guard let at: Int = best, let merge = table[[slow[at], slow[at + 1]]] else { break }
                slow[at] = merge.joined
                slow.remove(at: at + 1)
            }
            XCTAssertEqual(merges.apply(symbols), slow)
        }
    }

    func testALongWordTakesNoTimeThatGrowsWithItsSquare() throws {
        let tokenizer: Tokenizer = try Vectors.tokenizer("llama3")
        let text: String = String(repeating: "a", count: 20_000)
        XCTAssertEqual(tokenizer.decode(tokenizer.encode(text, addSpecialTokens: false)), text)
    }

    func testDecodesDamagedUtf8AsSwiftDoes() {
        let choices: [UInt8] = [
            0x41, 0x7f, 0x80, 0x8f, 0x90, 0x9f, 0xa0, 0xbf, 0xc0, 0xc2, 0xdf, 0xe0, 0xe1, 0xed, 0xef, 0xf0, 0xf1, 0xf4,
            0xf5, 0xff,
        ]
        var random: SplitMix = SplitMix(seed: 5)
        for _ in 0..<2000 {
            let count: Int = Int(random.next() % 12)
            var bytes: [UInt8] = []
            for _ in 0..<count { bytes.append(choices[Int(random.next() % UInt64(choices.count))]) }
            var decoder: Utf8Decoder = Utf8Decoder()
            var found: String = ""
            for byte in bytes { found += decoder.push([byte]) }
            found += decoder.flush()
            XCTAssertEqual(Array(found.utf8), Array(String(decoding: bytes, as: UTF8.self).utf8), "\(bytes)")
        }
    }

    func testRefusesOtherTokenizersWithTheReason() throws {
        let file: String = String(decoding: try Vectors.bytes("llama3.tokenizer.json"), as: UTF8.self)
        for (old, new) in [
            ("\"normalizer\": null", "\"normalizer\": {\"type\": \"NFC\"}"),
            ("\"type\": \"BPE\"", "\"type\": \"Unigram\""),
            ("\"Isolated\"", "\"Removed\""),
            ("\"lstrip\": false", "\"lstrip\": true"),
            ("{1,3}", "{1,2}"),
            ("\"type\": \"TemplateProcessing\"", "\"type\": \"BertProcessing\""),
        ] {
            let range: Range<String.Index> = try XCTUnwrap(file.range(of: old), old)
            let other: String = file.replacingCharacters(in: range, with: new)
            XCTAssertThrowsError(try Tokenizer(Array(other.utf8)), old) { (error: any Error) in
                XCTAssertFalse(((error as? EdgeLlamaError)?.remedy ?? "").isEmpty, "\(error)")
            }
        }
        XCTAssertThrowsError(try Tokenizer(Array("{}".utf8)))
        XCTAssertThrowsError(try Tokenizer(Array(file.utf8.prefix(2000))))
    }
}
