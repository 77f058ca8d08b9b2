/// Token ids of a conversation, and how many messages at its beginning found no room.
struct Prompt: Sendable {
    let ids: [Int]
    let dropped: Int
}

/// Encoder of conversations that fit the context, by the rule of edgellama/text/conversation.py.
struct Conversation: Sendable {
    let format: ChatFormat
    let tokenizer: Tokenizer

    /// Token ids with the assistant's turn opened. A control token in a message is text.
    func encode(_ messages: [Message]) throws -> [Int] {
        tokenizer.encode(try format.parts(messages, addGenerationPrompt: true))
    }

    /// The conversation without its oldest turns, if it is longer than the context. A system message stays.
    ///
    /// A quarter of the context, or `answerTokens` if they are fewer, stays free for the answer while there are turns
    /// to leave out. Nil if the last message alone does not fit.
    func prompt(_ messages: [Message], contextLength: Int, answerTokens: Int) throws -> Prompt? {
        let system: [Message] = messages.prefix(1).filter { $0.role == .system }
        let turns: [Message] = Array(messages.dropFirst(system.count))
        let room: Int = contextLength - min(answerTokens, contextLength / 4)
        for dropped in stride(from: 0, to: turns.count, by: 2) {  // a user's message and its answer
            let ids: [Int] = try encode(system + turns.dropFirst(dropped))
            if ids.count <= (dropped + 1 == turns.count ? contextLength : room) {
                return Prompt(ids: ids, dropped: dropped)
            }
        }
        return nil
    }
}
