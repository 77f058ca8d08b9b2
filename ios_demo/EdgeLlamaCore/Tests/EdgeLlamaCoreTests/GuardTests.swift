import Foundation
import XCTest

@testable import EdgeLlamaCore

/// Says what VectorModel says, and notes what it is asked.
final class NotedModel: LogitsModel, @unchecked Sendable {
    let vocabSize: Int = 512
    let outputSize: Int
    let contextLength: Int = 1024
    let runtime: String = "noted"
    private let inner: VectorModel
    private let change: (Int, inout [Float]) -> Void
    var calls: [[Int]] = []

    /// change: what becomes of the logits of a call at a position.
    init(size: Int, start: UInt64, change: @escaping (Int, inout [Float]) -> Void = { _, _ in }) {
        outputSize = size
        inner = VectorModel(scale: 0, size: size, start: start)
        self.change = change
    }

    func forward(_ tokens: [Int], at position: Int) throws -> [Float] {
        calls.append([position] + tokens)
        var logits: [Float] = try inner.forward(tokens, at: position)
        change(position, &logits)
        return logits
    }
}

final class GuardTests: XCTestCase {
    private func vectors() throws -> JsonObject { try Vectors.json("guard.json") }

    private func tokenizer() throws -> Tokenizer { try Vectors.tokenizer(try vectors().string("tokenizer")) }

    private func classifier(_ name: String = "several") throws -> Classifier {
        try Classifier(try vectors().object("classifiers").object(name))
    }

    /// The classifier whose conversation loses white space around contents, or does not.
    private func classifier(trim: Bool) throws -> Classifier {
        let section: JsonObject = try vectors().object("classifiers").object("several")
        let policy: JsonObject = try section.object("guard")
        let talk: [JsonMember] = Json.with(try policy.object("conversation").members, "trim", .bool(trim))
        let altered: [JsonMember] = Json.with(policy.members, "conversation", .object(talk))
        return try classifier(of: Json.with(section.members, "guard", .object(altered)))
    }

    private func classifier(of members: [JsonMember]) throws -> Classifier {
        try Classifier(try JsonObject.parse(Array(Json.object(members).written().utf8), name: "section"))
    }

    func testEncodesConversationsAsPython() throws {
        let tokenizer: Tokenizer = try tokenizer()
        let judges: [Bool: Classifier] = [true: try classifier(trim: true), false: try classifier(trim: false)]
        let cases: [JsonObject] = try vectors().objects("conversations")
        XCTAssertGreaterThan(cases.count, 30)
        for item in cases {
            let judge: Classifier = try XCTUnwrap(judges[try item.bool("trim")])
            let length: Int = try item.int("context_length")
            let encode: () throws -> [Int] = {
                if let text: String = try? item.string("messages") {
                    return try judge.encode(text, tokenizer, contextLength: length)
                }
                return try judge.encode(try Vectors.messages(item), tokenizer, contextLength: length)
            }
            switch try item.stringOrNil("refused") {
            case nil: XCTAssertEqual(try encode(), try item.ints("ids"), "\(item.members)")
            case "context": assertFails("context holds \(length)") { _ = try encode() }
            default: assertFails("roles") { _ = try encode() }
            }
        }
    }

    func testAnswersAsPython() throws {
        let tokenizer: Tokenizer = try tokenizer()
        let judges: [String: Classifier] = ["several": try classifier(), "one": try classifier("one")]
        let flags: Calibration = Calibration(
            artifactSha256: "", temperature: 0.5, threshold: Threshold(label: Guard.unsafe, probability: 0)
        )
        let cases: [JsonObject] = try vectors().objects("answers")
        XCTAssertGreaterThan(cases.count, 100)
        for item in cases {
            let about: String = "\(item.members)"
            let judge: Classifier = try XCTUnwrap(judges[try item.string("classifier")])
            let model: NotedModel = NotedModel(size: judge.rows, start: UInt64(try item.int("start")))
            let calibration: Calibration? = try item.bool("flags") ? flags : nil
            let length: Int = try item.int("context_length")
            let whole: TextClassifier = TextClassifier(judge, calibration, tokenizer, contextLength: length)
            let answer: Classification? = try whole.classify(try item.string("text"), session: Session(model))
            let found: Classification = try XCTUnwrap(answer)
            let expected: JsonObject = try item.object("answer")
            XCTAssertEqual(found.label, try expected.string("label"), about)
            XCTAssertEqual(found.categories, try Vectors.strings(expected, "categories"), about)
            XCTAssertEqual(found.flagged, expected.isNull("flagged") ? nil : try expected.bool("flagged"), about)
            XCTAssertEqual(found.tokens, try expected.int("tokens"), about)
            for (share, own) in zip(try expected.doubles("probabilities"), found.probabilities) {
                XCTAssertEqual(share, own.probability, accuracy: 1e-12, about)
            }
            let calls: [[Int]] = try item.array("calls").map { (call: Json) -> [Int] in
                guard case .array(let numbers) = call else { throw JsonError(message: "no call") }
                return try numbers.map { (number: Json) -> Int in
                    guard case .int(let value) = number else { throw JsonError(message: "no number") }
                    return value
                }
            }
            XCTAssertEqual(Array(model.calls.dropFirst()), calls, about)
        }
    }

    func testOpensWhatPythonOpens() throws {
        let cases: [JsonObject] = try vectors().objects("sections")
        XCTAssertGreaterThan(cases.count, 10)
        for item in cases {
            let directory: URL = try copyOfBundle("classifier")
            let values: [String: Json] = Dictionary(uniqueKeysWithValues: item.members.map { ($0.name, $0.value) })
            try classify(directory, try XCTUnwrap(values["classifier"]), try XCTUnwrap(values["label_rows"]))
            if try item.bool("opens") {
                XCTAssertEqual(try ModelBundle(directory).outputSize, try item.int("label_rows"))
            } else {
                assertFails("classifier") { _ = try ModelBundle(directory) }
            }
        }
    }

    func testRefusesAConversationWithoutAGuardAndAGuardWithoutItsLabel() throws {
        let plain: ModelBundle = try Vectors.classifier()
        let judge: TextClassifier = try TextClassifier(
            bundle: plain, target: "xnnpack", tokenizer: try plain.tokenizer()
        )
        let session: Session = Session(FixedModel([Float](repeating: 0, count: 6)))
        let answer: Classification? = try judge.classify("a", session: session)
        XCTAssertNil(try XCTUnwrap(answer).categories)
        assertFails("got a conversation") { _ = try judge.classify([Message(.user, "a")], session: session) }
        let text: String = Json.object(try vectors().object("classifiers").object("several").members).written()
        let other: String = text.replacingOccurrences(of: "\"unsafe\"", with: "\"bad\"")
        assertFails("without a token for the label unsafe") {
            _ = try Classifier(try JsonObject.parse(Array(other.utf8), name: "section"))
        }
    }

    func testRefusesBrokenLogitsInAnAnswerAndStops() throws {
        let judge: TextClassifier = TextClassifier(try classifier(), nil, try tokenizer(), contextLength: 256)
        for bad in [Float.nan, Float.infinity] {
            let model: NotedModel = NotedModel(size: judge.classifier.rows, start: 100) { position, logits in
                if position == 0 { logits[1] = 99 } else { logits[logits.count - 1] = bad }
            }
            assertFails("no finite numbers") { _ = try judge.classify("a", session: Session(model)) }
            var asked: Int = 0
            let stopped: Classification? = try judge.classify("a", session: Session(model)) {
                asked += 1
                return asked > 1  // after the prefill
            }
            XCTAssertNil(stopped)
        }
    }
}
