/// Text around the messages of a conversation whose last message a guard judges.
struct GuardConversation: Sendable {
    /// Text before the first message and after the last one, by the role of the last.
    private let before: [Role: String]
    private let after: [Role: String]
    /// Text between two messages, by the role of the second.
    private let between: [Role: String]
    private let trim: Bool

    init(_ json: JsonObject) throws {
        before = try GuardConversation.byRole(try json.object("before"))
        after = try GuardConversation.byRole(try json.object("after"))
        between = [.assistant: try json.string("to_assistant"), .user: try json.string("to_user")]
        trim = try json.bool("trim")
    }

    /// The text in parts. Throws unless user and assistant speak in turn, the user first.
    func parts(_ messages: [Message]) throws -> [TextPart] {
        let inTurn: Bool = messages.enumerated().allSatisfy { $1.role == ($0 % 2 == 0 ? .user : .assistant) }
        guard let judged: Role = messages.last?.role, inTurn else {
            let roles: String = messages.map { $0.role.rawValue }.joined(separator: ", ")
            throw EdgeLlamaError.tokenizer(
                "the conversation has the roles \(roles)",
                remedy: "Give messages of user and assistant in turn, user first; the last one is judged."
            )
        }
        var parts: [TextPart] = [TextPart(text: before[judged] ?? "", isTyped: false)]
        for (index, message) in messages.enumerated() {
            if index > 0 { parts.append(TextPart(text: between[message.role] ?? "", isTyped: false)) }
            let content: String = trim ? ChatFormat.strip(message.content) : message.content
            parts.append(TextPart(text: content, isTyped: true))
        }
        return parts + [TextPart(text: after[judged] ?? "", isTyped: false)]
    }

    private static func byRole(_ json: JsonObject) throws -> [Role: String] {
        [.user: try json.string("user"), .assistant: try json.string("assistant")]
    }
}

/// A category of the policy.
public struct GuardCategory: Sendable {
    public let code: String
    public let name: String
    /// Tokens of its code as the first of an answer, and after another one.
    let first: [Int]
    let further: [Int]
}

/// The section `guard` of a classifier: the conversation that is judged, and the tokens of the answers.
public struct Guard: Sendable {
    static let unsafe: String = "unsafe"
    /// At most, after the prefill; a call chooses a token, tokens without a choice go with it.
    static let calls: Int = 6

    public let categories: [GuardCategory]
    let conversation: GuardConversation
    /// Tokens of `unsafe` after its first one.
    fileprivate let rest: [Int]
    /// Tokens that end an answer.
    fileprivate let end: [Int]

    /// The guard in the section `json`. Throws for one that this app cannot read.
    init(_ json: JsonObject) throws {
        let categories: [GuardCategory] = try json.objects("categories").map {
            GuardCategory(
                code: try $0.string("code"), name: try $0.string("name"), first: try Guard.tokens($0, "first"),
                further: try Guard.tokens($0, "further")
            )
        }
        if categories.isEmpty || categories.contains(where: { $0.code.allSatisfy { $0.isWhitespace } }) {
            throw Classifier.wrong("its guard has \(categories.count) categories, and needs one or more with a code")
        }
        self.categories = categories
        conversation = try GuardConversation(try json.object("conversation"))
        rest = try json.ints("rest")
        end = try Guard.tokens(json, "end")
    }

    /// Tokens of all answers but the first, sorted.
    var tokens: [Int] { Set(rest + end + categories.flatMap { $0.first + $0.further }).sorted() }

    private static func tokens(_ json: JsonObject, _ name: String) throws -> [Int] {
        let tokens: [Int] = try json.ints(name)
        if tokens.isEmpty { throw Classifier.wrong("its guard has no tokens in \(name)") }
        return tokens
    }
}

/// An answer of a guard that is written token by token.
struct GuardAnswer {
    /// Codes that an answer may come to have, with the tokens that are still missing.
    private struct Open {
        let codes: [String]
        let missing: [Int]
    }

    /// Codes that are complete.
    let codes: [String]
    private let policy: Guard
    private let possible: [Open]

    /// The answer after the first token of `unsafe`.
    init(_ policy: Guard) {
        let possible: [Open] = policy.categories.map { Open(codes: [$0.code], missing: policy.rest + $0.first) }
        self.init(policy, possible, codes: [])
    }

    private init(_ policy: Guard, _ possible: [Open], codes: [String]) {
        self.policy = policy
        self.possible = possible
        self.codes = codes
    }

    /// Tokens that may follow, sorted: those of codes that were not given yet, or an end after a whole code.
    var allowed: [Int] { Set(continuations.map { $0.token }).sorted() }

    /// The answer with one more of the allowed tokens; nil at its end.
    func then(_ token: Int) -> GuardAnswer? {
        if policy.end.contains(token) { return nil }
        let states: [Open] = continuations.filter { $0.token == token }.compactMap { $0.state }
        return GuardAnswer(policy, states, codes: states.first { $0.missing.isEmpty }?.codes ?? codes)
    }

    private var continuations: [(token: Int, state: Open?)] {
        possible.flatMap { (state: Open) -> [(token: Int, state: Open?)] in
            if let next: Int = state.missing.first {
                return [(next, Open(codes: state.codes, missing: Array(state.missing.dropFirst())))]
            }
            let ends: [(token: Int, state: Open?)] = policy.end.map { ($0, nil) }
            return ends + policy.categories.filter { !state.codes.contains($0.code) }.map {
                ($0.further[0], Open(codes: state.codes + [$0.code], missing: Array($0.further.dropFirst())))
            }
        }
    }
}
