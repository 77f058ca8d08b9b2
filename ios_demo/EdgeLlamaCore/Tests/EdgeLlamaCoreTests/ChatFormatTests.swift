import XCTest

@testable import EdgeLlamaCore

final class ChatFormatTests: XCTestCase {
    private func format(_ name: String) throws -> ChatFormat {
        try ChatFormat(try Vectors.json("chat.json").object("formats").object(name))
    }

    func testRendersAsPython() throws {
        let cases: [JsonObject] = try Vectors.json("chat.json").objects("cases")
        XCTAssertGreaterThan(cases.count, 100)
        let formats: [String: ChatFormat] = ["smollm2": try format("smollm2"), "llama3": try format("llama3")]
        for item in cases {
            let format: ChatFormat = try XCTUnwrap(formats[try item.string("format")])
            let found: String = try format.render(
                try Vectors.messages(item), addGenerationPrompt: try item.bool("add_generation_prompt")
            )
            XCTAssertEqual(Array(found.utf8), Array(try item.string("text").utf8))
        }
    }

    func testRefusesOtherOrdersOfRoles() throws {
        let refused: [JsonObject] = try Vectors.json("chat.json").objects("refused")
        XCTAssertFalse(refused.isEmpty)
        for item in refused {
            let format: ChatFormat = try format(try item.string("format"))
            let messages: [Message] = try Vectors.messages(item)
            let opened: Bool = try item.bool("add_generation_prompt")
            assertFails("the conversation has the roles") {
                _ = try format.render(messages, addGenerationPrompt: opened)
            }
        }
    }
}
