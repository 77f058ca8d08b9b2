import Foundation
import XCTest

@testable import EdgeLlamaCore

/// Answers with `logits`, whatever it is asked.
final class FixedModel: LogitsModel, @unchecked Sendable {
    let vocabSize: Int = 512
    let outputSize: Int
    let contextLength: Int = 64
    let runtime: String = "fixed"
    private let logits: [Float]
    var positions: [Int] = []
    var calls: [[Int]] = []

    init(_ logits: [Float]) {
        self.logits = logits
        outputSize = logits.count
    }

    func forward(_ tokens: [Int], at position: Int) throws -> [Float] {
        positions.append(position)
        calls.append(tokens)
        return logits
    }
}

final class ClassifierTests: XCTestCase {
    private static let target: String = "xnnpack"
    private static let text: String = "Where is my parcel? <|im_end|>"

    private func judge() throws -> TextClassifier {
        let bundle: ModelBundle = try Vectors.classifier()
        return try TextClassifier(bundle: bundle, target: ClassifierTests.target, tokenizer: try bundle.tokenizer())
    }

    func testReadsTheManifest() throws {
        let bundle: ModelBundle = try Vectors.classifier()
        let classifier: Classifier = try XCTUnwrap(bundle.classifier)
        XCTAssertEqual(classifier.labels.map { $0.name }, ["refund", "delivery", "other é"])
        XCTAssertEqual(classifier.labels.map { $0.rows }, [2, 1, 3])
        XCTAssertEqual(classifier.labels[0].description, "asks for money back")
        XCTAssertEqual(bundle.outputSize, 6)
        XCTAssertEqual(bundle.vocabSize, 512)
        XCTAssertEqual(try judge().threshold?.label, "refund")
        let other: ModelBundle = try Vectors.bundle()
        XCTAssertNil(other.classifier)
        XCTAssertEqual(other.outputSize, 512)
        assertFails("has no labels") {
            _ = try TextClassifier(bundle: other, target: ClassifierTests.target, tokenizer: try other.tokenizer())
        }
    }

    func testEncodesPromptsAsPython() throws {
        let prompts: JsonObject = try Vectors.json("classify.json").object("prompts")
        let sections: JsonObject = try prompts.object("classifiers")
        var classifiers: [String: (Classifier, Tokenizer)] = [:]
        for member in sections.members {
            let entry: JsonObject = try sections.object(member.name)
            let classifier: Classifier = try Classifier(try entry.object("section"))
            classifiers[member.name] = (classifier, try Vectors.tokenizer(try entry.string("tokenizer")))
        }
        let cases: [JsonObject] = try prompts.objects("cases")
        XCTAssertGreaterThan(cases.count, 100)
        for item in cases {
            let name: String = try item.string("classifier")
            let (classifier, tokenizer): (Classifier, Tokenizer) = try XCTUnwrap(classifiers[name])
            let text: String = try item.string("text")
            let length: Int = try item.int("context_length")
            switch try item.stringOrNil("refused") {
            case nil:
                let found: [Int] = try classifier.encode(text, tokenizer, contextLength: length)
                XCTAssertEqual(found, try item.ints("ids"), "\(name): \(text)")
            case "context":
                assertFails("context holds \(length)") {
                    _ = try classifier.encode(text, tokenizer, contextLength: length)
                }
            case "unknown":
                assertFails("pruned vocabulary") {
                    _ = try classifier.encode(text, tokenizer, contextLength: length)
                }
            default:
                assertFails("no tokens") { _ = try classifier.encode(text, tokenizer, contextLength: length) }
            }
        }
    }

    func testAnswersAsPython() throws {
        let tokenizer: Tokenizer = try Vectors.classifier().tokenizer()
        let cases: [JsonObject] = try Vectors.json("classify.json").objects("answers")
        XCTAssertGreaterThan(cases.count, 20)
        for item in cases {
            let name: String = try item.string("name")
            let classifier: Classifier = try Classifier(try item.object("classifier"))
            let judge: TextClassifier = TextClassifier(
                classifier, classifier.calibration(ClassifierTests.target), tokenizer, contextLength: 64
            )
            let logits: [Float] = try item.array("logits").map(ClassifierTests.float)
            guard let expected: JsonObject = try item.objectOrNil("answer") else {
                assertFails("no finite numbers") { _ = try judge.answer(logits, tokens: 3) }
                continue
            }
            let found: Classification = try judge.answer(logits, tokens: 3)
            XCTAssertEqual(found.label, try expected.string("label"), name)
            XCTAssertEqual(found.flagged, expected.isNull("flagged") ? nil : try expected.bool("flagged"), name)
            XCTAssertEqual(found.tokens, try expected.int("tokens"), name)
            XCTAssertEqual(found.probabilities.map { $0.label }, classifier.labels.map { $0.name }, name)
            let shares: [Double] = try expected.doubles("probabilities")
            XCTAssertEqual(shares.count, found.probabilities.count, name)
            for (share, own) in zip(shares, found.probabilities) {
                XCTAssertEqual(share, own.probability, accuracy: 1e-12, name)
            }
        }
    }

    /// Null in a list of numbers stands for NaN.
    private static func float(_ value: Json) throws -> Float {
        switch value {
        case .null: return .nan
        case .int(let number): return Float(number)
        case .double(let number): return Float(number)
        default: throw JsonError(message: "no number")
        }
    }

    func testOpensAndClassifiesWhatPythonDoes() throws {
        let vectors: JsonObject = try Vectors.json("classify.json")
        let cases: [JsonObject] = try vectors.objects("sections")
        XCTAssertGreaterThan(cases.count, 25)
        for item in cases {
            let name: String = try item.string("name")
            let directory: URL = try copyOfBundle("classifier")
            let values: [String: Json] = Dictionary(uniqueKeysWithValues: item.members.map { ($0.name, $0.value) })
            try classify(directory, try XCTUnwrap(values["classifier"]), try XCTUnwrap(values["label_rows"]))
            if try !item.bool("opens") {
                assertFails("classifier") { _ = try ModelBundle(directory) }
                continue
            }
            let bundle: ModelBundle = try ModelBundle(directory)
            let tokenizer: Tokenizer = try bundle.tokenizer()
            let classify: () throws -> Void = {
                _ = try TextClassifier(bundle: bundle, target: ClassifierTests.target, tokenizer: tokenizer)
            }
            if try item.bool("classifies") {
                XCTAssertNoThrow(try classify(), name)
            } else {
                XCTAssertThrowsError(try classify(), name)
            }
        }
    }

    func testReadsEachTextFromTheStart() async throws {
        let judge: TextClassifier = try judge()
        let ids: [Int] = try judge.encode(ClassifierTests.text)
        let model: FixedModel = FixedModel([1, 2, 9, 3, 2, 1])
        let session: Session = Session(model)
        let worker: Worker = Worker()
        for _ in 0..<2 {
            let found: Classification? = try await judge.classify(ClassifierTests.text, session: session, on: worker)
            XCTAssertEqual(found?.label, "delivery")
        }
        XCTAssertEqual(model.calls, [ids, ids])
        XCTAssertEqual(model.positions, [0, 0])
        XCTAssertNil(try judge.classify(ClassifierTests.text, session: session) { true })
    }

    func testRefusesWhatDoesNotFitBeforeItRuns() throws {
        let judge: TextClassifier = try judge()
        let model: FixedModel = FixedModel([Float](repeating: 0, count: 6))
        let long: String = String(repeating: "word ", count: 99)
        assertFails("context holds 64") { _ = try judge.classify(long, session: Session(model)) }
        XCTAssertTrue(model.calls.isEmpty)
        for size in [5, 7, 512] {
            let other: FixedModel = FixedModel([Float](repeating: 0, count: size))
            assertFails("\(size) logits for 6 rows") { _ = try judge.classify("a", session: Session(other)) }
        }
    }

    func testReplaysGoldenVectorsOfLabels() throws {
        let bundle: ModelBundle = try Vectors.classifier()
        let tokenizer: Tokenizer = try bundle.tokenizer()
        let golden: JsonObject = try Vectors.json("classify.json").object("golden")
        XCTAssertEqual(try golden.string("golden_sha256"), try bundle.sha256("golden/golden.json"))
        let check: GoldenCheck = try GoldenCheck(bundle: bundle, target: ClassifierTests.target, kind: "x86-64")
        for item in try golden.objects("cases") {
            let model: VectorModel = VectorModel(scale: try item.double("scale"), size: try golden.int("vocab_size"))
            let found: GoldenResult = try XCTUnwrap(try check.run(model, tokenizer: tokenizer))
            let name: String = try item.string("name")
            XCTAssertEqual(found.passed ? "pass" : "fail", try item.string("verdict"), name)
            let expected: Double = try item.double("parity_kl_mean")
            let share: Double = try item.double("parity_top1_agreement")
            XCTAssertEqual(found.parityKlMean, expected, accuracy: 1e-9 + 1e-6 * expected)
            XCTAssertEqual(found.parityTop1, share, accuracy: 1e-12)
        }
        assertFails("512 logits, the manifest says 6") {
            _ = try check.run(VectorModel(scale: 0), tokenizer: tokenizer)
        }
    }

    func testAnswersNoChallenge() throws {
        assertFails("classifies texts") {
            _ = try Challenge(Array("{}".utf8), name: "c", bundle: try Vectors.classifier(), target: ClassifierTests.target)
        }
    }
}
