import Foundation

/// One answer of a classifier. (SwiftUI has a Label.)
public struct ClassifierLabel: Sendable {
    public let name: String
    public let description: String
    /// Number of rows of the output layer that mean it, one after the other.
    public let rows: Int
    /// Tokens of these rows; a trained head has none.
    let tokens: [Int]
}

/// Least probability of the label `label` that counts as that label.
public struct Threshold: Sendable {
    public let label: String
    public let probability: Double
}

/// Calibration of the answers of one artifact: scores are divided by `temperature`.
struct Calibration: Sendable {
    let artifactSha256: String
    let temperature: Double
    let threshold: Threshold?
}

/// Tokens of a pruned vocabulary below `seen` are those of its corpus.
struct PrunedVocabulary: Sendable {
    let seen: Int
    /// A text with another token is not read.
    let refusesOthers: Bool
}

/// The section `classifier` of a manifest: the meaning of the logits, and the text that is read.
public struct Classifier: Sendable {
    private static let place: String = "{text}"
    private static let score: String = "score"
    private static let tokens: String = "tokens"
    private static let maxTemperature: Double = 1e38  // of the manifest's schema

    public let labels: [ClassifierLabel]
    /// The text before and after the text to classify.
    public let before: String
    public let after: String
    /// Policy and further answers of a safety model; nil for another classifier.
    public let policy: Guard?
    /// Row of each token; empty for a trained head. Those of a guard's further answers follow those of the labels.
    let rowOf: [Int: Int]
    /// Number of logits.
    let rows: Int
    private let padding: Int?
    private let vocabulary: PrunedVocabulary?
    private let calibrations: [String: Calibration]

    /// The classifier in the section `json`. Throws for one that this app cannot read.
    init(_ json: JsonObject) throws {
        for (name, known) in [
            ("head", [Classifier.score, Classifier.tokens]), ("pooling", ["last"]),
            ("problem_type", ["single_label_classification"]),
        ] {
            let found: String = try json.string(name)
            if !known.contains(found) {
                throw Classifier.wrong("its \(name) is \(found), this app reads \(known.joined(separator: ", "))")
            }
        }
        let head: String = try json.string("head")
        let labels: [ClassifierLabel] = try json.objects("labels").map { try Classifier.label($0, head) }
        let isBlank: Bool = labels.contains { $0.name.allSatisfy { $0.isWhitespace } }
        // Names are compared by their bytes: Swift takes é and e with an accent for the same.
        if labels.count < 2 || Set(labels.map { Array($0.name.utf8) }).count < labels.count || isBlank {
            throw Classifier.wrong("it has \(labels.count) labels, and needs two or more of different names")
        }
        let prompt: [String] = Classifier.parts(try json.string("prompt"))
        if prompt.count != 2 {
            throw Classifier.wrong("its prompt holds \(Classifier.place) \(prompt.count - 1) times, and needs it once")
        }
        let padding: Int? = json.isNull("padding") ? nil : try json.int("padding")
        if let padding: Int = padding, padding < 0 {
            throw Classifier.wrong("its padding is \(padding), which is no token")
        }
        let policy: Guard? = try json.objectOrNil("guard").map { try Guard($0) }
        let judges: Bool = head == Classifier.tokens && labels.contains { $0.name == Guard.unsafe }
        if policy != nil && !judges { throw Classifier.wrong("it is a guard without a token for the label \(Guard.unsafe)") }
        let own: [Int] = labels.flatMap { $0.tokens }
        let further: [Int] = policy?.tokens.filter { !own.contains($0) } ?? []
        rows = labels.reduce(0) { $0 + $1.rows } + further.count
        var rowOf: [Int: Int] = [:]
        for (row, token) in (own + further).enumerated() { rowOf[token] = row }
        self.rowOf = rowOf
        self.policy = policy
        self.labels = labels
        before = prompt[0]
        after = prompt[1]
        self.padding = padding
        vocabulary = try json.objectOrNil("vocabulary").map { try Classifier.vocabulary($0) }
        calibrations = try Classifier.calibrations(try json.objectOrNil("calibration"))
    }

    /// Temperature and threshold of the artifact for `target`; nil without any.
    func calibration(_ target: String) -> Calibration? { calibrations[target] }

    /// Token ids to read for `text`, which a guard takes for a message of the user; at most `contextLength`. A control
    /// token in it is text.
    func encode(_ text: String, _ tokenizer: Tokenizer, contextLength: Int) throws -> [Int] {
        if policy != nil { return try encode([Message(.user, text)], tokenizer, contextLength: contextLength) }
        let parts: [TextPart] = [
            TextPart(text: before, isTyped: false), TextPart(text: text, isTyped: true),
            TextPart(text: after, isTyped: false),
        ]
        return try encoded(parts, tokenizer, contextLength)
    }

    /// Token ids to read for a conversation, whose last message a guard judges.
    func encode(_ messages: [Message], _ tokenizer: Tokenizer, contextLength: Int) throws -> [Int] {
        guard let policy: Guard = policy else {
            throw EdgeLlamaError.tokenizer(
                "this classifier reads one text, and got a conversation", remedy: "Give a text, or a bundle of a guard."
            )
        }
        return try encoded(try policy.conversation.parts(messages), tokenizer, contextLength)
    }

    private func encoded(_ parts: [TextPart], _ tokenizer: Tokenizer, _ contextLength: Int) throws -> [Int] {
        var ids: [Int] = tokenizer.encode(parts, addSpecialTokens: true)
        // The logits after the last other token count.
        while ids.count > 1, let padding: Int = padding, ids.last == padding { ids.removeLast() }
        if ids.isEmpty {
            throw EdgeLlamaError.tokenizer("the text to classify holds no tokens", remedy: "Give a text that is not empty.")
        }
        if let known: PrunedVocabulary = vocabulary, known.refusesOthers {
            let unseen: Int = ids.filter { $0 >= known.seen }.count
            if unseen > 0 {
                throw EdgeLlamaError.tokenizer(
                    "the text holds \(unseen) of \(ids.count) tokens that the corpus of the pruned vocabulary never has",
                    remedy: "Export with more texts in --prune-vocabulary, or with --unknown bytes."
                )
            }
        }
        if ids.count > contextLength {
            throw EdgeLlamaError.context(
                "the text has \(ids.count) tokens with its prompt, and the context holds \(contextLength)"
            )
        }
        return ids
    }

    /// Score of each label: the logarithm of the sum of the exponentials of its rows.
    func scores(_ logits: [Float]) -> [Double] {
        var row: Int = 0
        return labels.map { (label: ClassifierLabel) -> Double in
            let own: ArraySlice<Float> = logits[row..<row + label.rows]
            row += label.rows
            return own.dropFirst().reduce(Double(own[own.startIndex])) { Classifier.logAddExp($0, Double($1)) }
        }
    }

    private static func label(_ json: JsonObject, _ head: String) throws -> ClassifierLabel {
        let texts: Int = try json.array("texts").count
        let own: [Int] = try json.ints("tokens")
        let name: String = try json.string("label")
        let description: String = try json.string("description")
        if head == score { return ClassifierLabel(name: name, description: description, rows: 1, tokens: []) }
        if own.isEmpty || own.count != texts {
            throw wrong("its label \(name) has \(own.count) tokens for \(texts) texts")
        }
        return ClassifierLabel(name: name, description: description, rows: own.count, tokens: own)
    }

    private static func vocabulary(_ json: JsonObject) throws -> PrunedVocabulary {
        let rule: String = try json.string("unknown")
        if rule != "refuse" && rule != "bytes" { throw wrong("its rule for unknown tokens is \(rule)") }
        let seen: Int = try json.int("seen")
        if seen < 1 { throw wrong("its pruned vocabulary has \(seen) tokens of a corpus") }
        return PrunedVocabulary(seen: seen, refusesOthers: rule == "refuse")
    }

    private static func calibrations(_ json: JsonObject?) throws -> [String: Calibration] {
        guard let json: JsonObject = json else { return [:] }
        var found: [String: Calibration] = [:]
        for member in json.members { found[member.name] = try calibration(try json.object(member.name)) }
        return found
    }

    private static func calibration(_ json: JsonObject) throws -> Calibration {
        let threshold: Threshold? = try json.objectOrNil("threshold").map {
            Threshold(label: try $0.string("label"), probability: try $0.double("probability"))
        }
        let temperature: Double = try json.double("temperature")
        if !(temperature > 0 && temperature <= maxTemperature) { throw wrong("its temperature is \(temperature)") }
        if let least: Double = threshold?.probability, !(0...1).contains(least) {
            throw wrong("its threshold is \(least), which is no probability")
        }
        return Calibration(
            artifactSha256: try json.string("artifact_sha256"), temperature: temperature, threshold: threshold
        )
    }

    /// The parts of a prompt around its places for a text.
    private static func parts(_ prompt: String) -> [String] {
        let text: [UInt8] = Array(prompt.utf8)
        let mark: [UInt8] = Array(place.utf8)
        var parts: [String] = []
        var start: Int = 0
        var at: Int = 0
        while at < text.count {
            if text[at...].starts(with: mark) {
                parts.append(String(decoding: text[start..<at], as: UTF8.self))
                at += mark.count
                start = at
            } else {
                at += 1
            }
        }
        return parts + [String(decoding: text[start...], as: UTF8.self)]
    }

    static func wrong(_ reason: String) -> EdgeLlamaError {
        EdgeLlamaError.bundle("this app cannot read the classifier of this bundle: \(reason)")
    }

    /// log(exp(a) + exp(b)), as numpy computes it.
    private static func logAddExp(_ a: Double, _ b: Double) -> Double {
        a == b ? a + log(2) : max(a, b) + log1p(exp(-abs(a - b)))
    }
}
