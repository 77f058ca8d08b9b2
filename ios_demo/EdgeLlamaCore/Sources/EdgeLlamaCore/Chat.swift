/// A conversation with a model. The KV cache goes on from turn to turn.
public struct Chat: Sendable {
    private let format: ChatFormat
    private let system: String
    private var turns: [Message] = []

    public init(format: ChatFormat, system: String = "") {
        self.format = format
        self.system = system
    }

    /// The messages so far, the system message first; a blank one is none.
    public var messages: [Message] {
        let blank: Bool = system.unicodeScalars.allSatisfy { CodePoints.spaces.contains($0.value) }
        return (blank ? [] : [Message(.system, system)]) + turns
    }

    /// Takes the user's message, and gives the text of the conversation with the assistant's turn opened. Encode it
    /// without adding special tokens.
    public mutating func ask(_ text: String) throws -> String {
        let asked: [Message] = messages + [Message(.user, text)]
        let prompt: String = try format.render(asked, addGenerationPrompt: true)
        turns.append(Message(.user, text))
        return prompt
    }

    public mutating func answered(_ text: String) {
        turns.append(Message(.assistant, text))
    }

    /// Takes back the last question, which got no answer.
    public mutating func withdraw() {
        if turns.last?.role == .user { turns.removeLast() }
    }
}
