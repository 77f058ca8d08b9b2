/// A conversation with a model. The KV cache goes on from turn to turn.
public struct Chat: Sendable {
    private let conversation: Conversation
    private let contextLength: Int
    private let system: String
    private var turns: [Message] = []

    /// Whether turns were left out, because the context is full.
    public private(set) var forgets: Bool = false

    public init(format: ChatFormat, tokenizer: Tokenizer, contextLength: Int, system: String = "") {
        conversation = Conversation(format: format, tokenizer: tokenizer)
        self.contextLength = contextLength
        self.system = system
    }

    /// The messages that the model still knows, the system message first; a blank one is none.
    public var messages: [Message] {
        let blank: Bool = system.unicodeScalars.allSatisfy { CodePoints.spaces.contains($0.value) }
        return (blank ? [] : [Message(.system, system)]) + turns
    }

    /// Takes the user's message, and gives the tokens of the conversation with the assistant's turn opened. The oldest
    /// turns go when the context is full. Throws when this message alone does not fit.
    public mutating func ask(_ text: String, answerTokens: Int) throws -> [Int] {
        let asked: [Message] = messages + [Message(.user, text)]
        guard let prompt: Prompt = try conversation.prompt(
            asked, contextLength: contextLength, answerTokens: answerTokens
        ) else {
            let alone: [Message] = Array(asked.dropLast(turns.count + 1)) + [Message(.user, text)]
            let length: Int = try conversation.encode(alone).count
            throw EdgeLlamaError.context("this turn has \(length) tokens, and the context holds \(contextLength)")
        }
        if prompt.dropped > 0 { forgets = true }
        turns.append(Message(.user, text))
        turns.removeFirst(prompt.dropped)
        return prompt.ids
    }

    public mutating func answered(_ text: String) {
        turns.append(Message(.assistant, text))
    }

    /// Takes back the last question, which got no answer.
    public mutating func withdraw() {
        if turns.last?.role == .user { turns.removeLast() }
    }
}
