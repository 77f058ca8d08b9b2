import XCTest

@testable import EdgeLlamaCore

final class ConversationTests: XCTestCase {
    private func format(_ name: String) throws -> ChatFormat {
        try ChatFormat(try Vectors.json("chat.json").object("formats").object(name))
    }

    func testEncodesAndForgetsAsPython() throws {
        var conversations: [String: Conversation] = [:]
        for name in ["smollm2", "llama3"] {
            conversations[name] = Conversation(format: try format(name), tokenizer: try Vectors.tokenizer(name))
        }
        let cases: [JsonObject] = try Vectors.json("conversation.json").objects("cases")
        XCTAssertGreaterThan(cases.count, 20)
        for item in cases {
            let conversation: Conversation = try XCTUnwrap(conversations[try item.string("format")])
            let prompt: Prompt? = try conversation.prompt(
                try Vectors.messages(item), contextLength: try item.int("context_length"),
                answerTokens: try item.int("answer_tokens")
            )
            if item.isNull("ids") {
                XCTAssertNil(prompt)
            } else {
                XCTAssertEqual(prompt?.ids, try item.ints("ids"))
                XCTAssertEqual(prompt?.dropped, try item.int("dropped"))
            }
        }
    }

    func testAConversationGrowsTurnByTurn() throws {
        let format: ChatFormat = try format("smollm2")
        let tokenizer: Tokenizer = try Vectors.tokenizer("smollm2")
        var chat: Chat = Chat(format: format, tokenizer: tokenizer, contextLength: 1000, system: "Be brief.")
        let first: [Int] = try chat.ask("Hi", answerTokens: 10)
        chat.answered("Hello!")
        let second: [Int] = try chat.ask("Bye", answerTokens: 10)
        let messages: [Message] = [
            Message(.system, "Be brief."), Message(.user, "Hi"), Message(.assistant, "Hello!"), Message(.user, "Bye"),
        ]
        let text: String = try format.render(messages, addGenerationPrompt: true)
        XCTAssertEqual(second, tokenizer.encode(text, addSpecialTokens: false))
        XCTAssertTrue(second.starts(with: first))
        XCTAssertFalse(chat.forgets)
        chat.withdraw()
        XCTAssertEqual(chat.messages, Array(messages.dropLast()))
        let blank: Chat = Chat(format: format, tokenizer: tokenizer, contextLength: 1000, system: " ")
        XCTAssertEqual(blank.messages, [], "a blank system message is none")
    }

    func testTheOldestTurnsGoAndTheSystemMessageStays() throws {
        let format: ChatFormat = try format("smollm2")
        let tokenizer: Tokenizer = try Vectors.tokenizer("smollm2")
        let system: Message = Message(.system, "Be brief.")
        let conversation: Conversation = Conversation(format: format, tokenizer: tokenizer)
        let one: Int = try conversation.encode([system, Message(.user, "Number 1")]).count
        var chat: Chat = Chat(
            format: format, tokenizer: tokenizer, contextLength: 3 * one, system: system.content
        )
        for turn in 1...6 {
            XCTAssertLessThanOrEqual(try chat.ask("Number \(turn)", answerTokens: 4).count, 3 * one - 4)
            chat.answered("Yes.")
        }
        XCTAssertTrue(chat.forgets)
        XCTAssertEqual(chat.messages.first, system)
        XCTAssertLessThan(chat.messages.count, 13)
        XCTAssertEqual(chat.messages.suffix(2).first?.content, "Number 6")
        let before: [Message] = chat.messages
        assertFails("this turn has") {
            _ = try chat.ask(String(repeating: "long ", count: 300), answerTokens: 4)
        }
        XCTAssertEqual(chat.messages, before, "a turn that does not fit changes nothing")
    }
}
