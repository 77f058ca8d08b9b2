import Foundation

/// The answer about one text.
public struct Classification: Sendable {
    /// A label with its probability.
    public struct Share: Sendable {
        public let label: String
        public let probability: Double
    }

    /// The most probable label, the first of equal ones.
    public let label: String
    /// In the order of the labels.
    public let probabilities: [Share]
    /// Whether the label of the bundle's threshold reaches it; nil without a threshold.
    public let flagged: Bool?
    public let tokens: Int
    /// Codes of the categories that a guard holds for violated; nil for another classifier.
    public internal(set) var categories: [String]?
}

/// Classifies texts with one artifact of a bundle, as `edgellama classify` does.
public struct TextClassifier: Sendable {
    public let classifier: Classifier
    private let tokenizer: Tokenizer
    private let contextLength: Int
    private let calibration: Calibration?

    init(_ classifier: Classifier, _ calibration: Calibration?, _ tokenizer: Tokenizer, contextLength: Int) {
        self.classifier = classifier
        self.calibration = calibration
        self.tokenizer = tokenizer
        self.contextLength = contextLength
    }

    /// Throws for a bundle that does not classify, and for a calibration of another artifact.
    public init(bundle: ModelBundle, target: String, tokenizer: Tokenizer) throws {
        guard let classifier: Classifier = bundle.classifier else {
            throw EdgeLlamaError.bundle(
                "\(bundle.name) generates text, and has no labels",
                remedy: "Export it with `edgellama export --task classify`."
            )
        }
        let calibration: Calibration? = classifier.calibration(target)
        if let calibration: Calibration = calibration {
            if calibration.artifactSha256 != (try bundle.artifactSha256(target)) {
                throw Classifier.wrong("its temperature and threshold were computed on another artifact")
            }
            if let name: String = calibration.threshold?.label, TextClassifier.place(name, classifier) == nil {
                throw Classifier.wrong("its threshold is of \(name), which is no label")
            }
        }
        self.init(classifier, calibration, tokenizer, contextLength: bundle.contextLength)
    }

    /// The threshold of this artifact; nil without one.
    public var threshold: Threshold? { calibration?.threshold }

    /// Token ids that are read for `text`. Throws for one that is empty or does not fit.
    public func encode(_ text: String) throws -> [Int] {
        try classifier.encode(text, tokenizer, contextLength: contextLength)
    }

    /// Token ids that are read for a conversation, whose last message a guard judges.
    public func encode(_ messages: [Message]) throws -> [Int] {
        try classifier.encode(messages, tokenizer, contextLength: contextLength)
    }

    /// The answer about `text`, computed on the worker that the model belongs to. Nil when its task was cancelled.
    public func classify(_ text: String, session: Session, on worker: Worker) async throws -> Classification? {
        let stopped: StopFlag = StopFlag()
        return try await withTaskCancellationHandler {
            try await worker.run { try classify(text, session: session, stopped: { stopped.isSet }) }
        } onCancel: {
            stopped.set()
        }
    }

    /// The answer about `text`, from one prefill. The text is read from the start, so that no answer depends on the
    /// one before. Nil when `stopped` said so.
    public func classify(
        _ text: String, session: Session, stopped: () -> Bool = { false }
    ) throws -> Classification? {
        try classify(try encode(text), session, stopped)
    }

    /// The answer of a guard about the last message of a conversation, as about a text.
    public func classify(
        _ messages: [Message], session: Session, stopped: () -> Bool = { false }
    ) throws -> Classification? {
        try classify(try encode(messages), session, stopped)
    }

    private func classify(_ ids: [Int], _ session: Session, _ stopped: () -> Bool) throws -> Classification? {
        session.reset()
        guard let logits: [Float] = try session.feed(ids, stopped: stopped) else { return nil }
        var answer: Classification = try answer(logits, tokens: ids.count)
        guard let policy: Guard = classifier.policy else { return answer }
        let isFlagged: Bool = answer.flagged == true && threshold?.label == Guard.unsafe
        answer.categories = []
        if isFlagged || answer.label == Guard.unsafe {
            guard let codes: [String] = try codes(policy, session, stopped) else { return nil }
            answer.categories = codes
        }
        return answer
    }

    /// Codes after the token `unsafe`, greedily among the tokens that may follow. Those that are complete after
    /// `Guard.calls` calls count, and so do those before the end of the context. Nil when `stopped` said so.
    private func codes(_ policy: Guard, _ session: Session, _ stopped: () -> Bool) throws -> [String]? {
        var answer: GuardAnswer = GuardAnswer(policy)
        var pending: [Int] = classifier.labels.first { $0.name == Guard.unsafe }.map { [$0.tokens[0]] } ?? []
        var calls: Int = 0
        while true {
            let allowed: [Int] = answer.allowed
            var chosen: Int = allowed[0]
            if allowed.count > 1 {
                if calls == Guard.calls || session.position + pending.count > contextLength { return answer.codes }
                if stopped() { return nil }
                let logits: [Float] = try checked(try session.push(pending))
                pending = []
                calls += 1
                for token in allowed where logits[classifier.rowOf[token]!] > logits[classifier.rowOf[chosen]!] {
                    chosen = token
                }
            }
            guard let next: GuardAnswer = answer.then(chosen) else { return answer.codes }
            answer = next
            pending.append(chosen)
        }
    }

    /// The answer that `logits` give after `tokens` tokens. Throws for what is no finite number.
    func answer(_ logits: [Float], tokens: Int) throws -> Classification {
        let scores: [Double] = classifier.scores(try checked(logits))
        let probabilities: [Double] = TextClassifier.softmax(scores, calibration?.temperature ?? 1)
        if probabilities.contains(where: { $0.isNaN }) { throw TextClassifier.broken }
        var best: Int = 0
        for label in scores.indices where scores[label] > scores[best] { best = label }
        var flagged: Bool?
        if let threshold: Threshold = threshold, let at: Int = TextClassifier.place(threshold.label, classifier) {
            flagged = probabilities[at] >= threshold.probability
        }
        return Classification(
            label: classifier.labels[best].name,
            probabilities: zip(classifier.labels, probabilities).map {
                Classification.Share(label: $0.name, probability: $1)
            },
            flagged: flagged,
            tokens: tokens
        )
    }

    private func checked(_ logits: [Float]) throws -> [Float] {
        if logits.count != classifier.rows {
            throw EdgeLlamaError(
                .model, "the model gave \(logits.count) logits for \(classifier.rows) rows of labels",
                remedy: EdgeLlamaError.exportAgain
            )
        }
        if !logits.allSatisfy({ $0.isFinite }) { throw TextClassifier.broken }
        return logits
    }

    private static let broken: EdgeLlamaError = EdgeLlamaError(
        .model, "the model computed logits that are no finite numbers, so there is no answer",
        remedy: "Run the accuracy check; it says whether this device computes the model correctly."
    )

    /// The number of the label called `name`, by its bytes.
    private static func place(_ name: String, _ classifier: Classifier) -> Int? {
        classifier.labels.firstIndex { $0.name.utf8.elementsEqual(name.utf8) }
    }

    private static func softmax(_ scores: [Double], _ temperature: Double) -> [Double] {
        let scaled: [Double] = scores.map { $0 / temperature }
        let top: Double = scaled.max() ?? 0
        let total: Double = log(scaled.reduce(0) { $0 + exp($1 - top) })
        return scaled.map { exp($0 - top - total) }
    }
}
