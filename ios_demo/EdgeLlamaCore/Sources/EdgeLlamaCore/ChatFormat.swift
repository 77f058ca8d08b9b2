/// Who speaks, under the names that chat templates use.
public enum Role: String, Sendable {
    case system
    case user
    case assistant
}

public struct Message: Equatable, Sendable {
    public let role: Role
    public let content: String

    public init(_ role: Role, _ content: String) {
        self.role = role
        self.content = content
    }
}

/// `chat.format` of a manifest: what surrounds each message, proven equal to the model's chat template.
public struct ChatFormat: Sendable {
    let noSystem: String
    let systemPrefix: String
    let systemSuffix: String
    let userPrefix: String
    let userSuffix: String
    let assistantPrefix: String
    let assistantSuffix: String
    let generationPrompt: String
    let trim: Bool

    init(_ json: JsonObject) throws {
        noSystem = try json.string("no_system")
        systemPrefix = try json.string("system_prefix")
        systemSuffix = try json.string("system_suffix")
        userPrefix = try json.string("user_prefix")
        userSuffix = try json.string("user_suffix")
        assistantPrefix = try json.string("assistant_prefix")
        assistantSuffix = try json.string("assistant_suffix")
        generationPrompt = try json.string("generation_prompt")
        trim = try json.bool("trim")
    }

    /// The text of a conversation: an optional system message, then user and assistant in turn. With
    /// `addGenerationPrompt` the assistant's turn is opened. It holds special tokens: encode it without adding any.
    public func render(_ messages: [Message], addGenerationPrompt: Bool = false) throws -> String {
        try parts(messages, addGenerationPrompt: addGenerationPrompt).map { $0.text }.joined()
    }

    /// The text of `render` in parts, of which those with the contents of messages are typed.
    func parts(_ messages: [Message], addGenerationPrompt: Bool = false) throws -> [TextPart] {
        let hasSystem: Bool = messages.first?.role == .system
        let turns: [Message] = Array(messages.dropFirst(hasSystem ? 1 : 0))
        var inTurn: Bool = !turns.isEmpty
        for (index, message) in turns.enumerated() where message.role != (index % 2 == 0 ? Role.user : Role.assistant) {
            inTurn = false
        }
        if !inTurn || (addGenerationPrompt && turns.last?.role != .user) {
            let roles: String = messages.map { $0.role.rawValue }.joined(separator: ", ")
            throw EdgeLlamaError.tokenizer(
                "the conversation has the roles [\(roles)]",
                remedy: "Give an optional system message, then user and assistant in turn."
            )
        }
        var parts: [TextPart] = [TextPart(text: hasSystem ? "" : noSystem, isTyped: false)]
        for message in messages {
            let content: String = trim ? ChatFormat.strip(message.content) : message.content
            parts.append(TextPart(text: prefix(message.role), isTyped: false))
            parts.append(TextPart(text: content, isTyped: true))
            parts.append(TextPart(text: suffix(message.role), isTyped: false))
        }
        return parts + [TextPart(text: addGenerationPrompt ? generationPrompt : "", isTyped: false)]
    }

    private func prefix(_ role: Role) -> String {
        switch role {
        case .system: return systemPrefix
        case .user: return userPrefix
        case .assistant: return assistantPrefix
        }
    }

    private func suffix(_ role: Role) -> String {
        switch role {
        case .system: return systemSuffix
        case .user: return userSuffix
        case .assistant: return assistantSuffix
        }
    }

    /// Without leading and trailing white space, which is Unicode's and U+001C to U+001F, as in Python.
    static func strip(_ text: String) -> String {
        var scalars: ArraySlice<Unicode.Scalar> = Array(text.unicodeScalars)[...]
        while let first: Unicode.Scalar = scalars.first, isSpace(first) { scalars.removeFirst() }
        while let last: Unicode.Scalar = scalars.last, isSpace(last) { scalars.removeLast() }
        var stripped: String.UnicodeScalarView = String.UnicodeScalarView()
        stripped.append(contentsOf: scalars)
        return String(stripped)
    }

    private static func isSpace(_ scalar: Unicode.Scalar) -> Bool {
        (scalar.value >= 0x1c && scalar.value <= 0x1f) || CodePoints.spaces.contains(scalar.value)
    }
}
