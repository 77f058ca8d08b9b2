import Foundation
import XCTest

@testable import EdgeLlamaCore

/// tests/vectors, written by Python: what every language computes.
enum Vectors {
    static let directory: URL = {
        var url: URL = URL(fileURLWithPath: #filePath)
        for _ in 0..<5 { url.deleteLastPathComponent() }
        return url.appendingPathComponent("tests/vectors", isDirectory: true)
    }()

    static func bytes(_ name: String) throws -> [UInt8] {
        [UInt8](try Data(contentsOf: directory.appendingPathComponent(name)))
    }

    static func json(_ name: String) throws -> JsonObject { try JsonObject.parse(try bytes(name), name: name) }

    static func tokenizer(_ name: String) throws -> Tokenizer {
        try Tokenizer(try bytes(try json("encode.json").object("tokenizers").string(name)))
    }

    static func bundle() throws -> ModelBundle { try ModelBundle(directory.appendingPathComponent("bundle")) }

    static func classifier() throws -> ModelBundle { try ModelBundle(directory.appendingPathComponent("classifier")) }

    static func messages(_ json: JsonObject) throws -> [Message] { try json.objects("messages").map(Golden.message) }

    static func strings(_ json: JsonObject, _ name: String) throws -> [String] {
        try json.array(name).map { (item: Json) -> String in
            guard case .string(let text) = item else { throw JsonError(message: "\(name) holds no strings") }
            return text
        }
    }

    static func bools(_ json: JsonObject, _ name: String) throws -> [Bool] {
        try json.array(name).map { (item: Json) -> Bool in
            guard case .bool(let value) = item else { throw JsonError(message: "\(name) holds no booleans") }
            return value
        }
    }
}

extension Json {
    /// The members with another value for one of them; none for null.
    static func with(_ members: [JsonMember], _ name: String, _ value: Json) -> [JsonMember] {
        members.filter { $0.name != name } + (value == .null ? [] : [JsonMember(name: name, value: value)])
    }
}

extension XCTestCase {
    /// A copy of the vectors' bundle that a test may damage.
    func copyOfBundle(_ name: String = "bundle") throws -> URL {
        let copy: URL = FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString)
        try FileManager.default.copyItem(at: Vectors.directory.appendingPathComponent(name), to: copy)
        addTeardownBlock { try? FileManager.default.removeItem(at: copy) }
        return copy
    }

    /// Puts another section `classifier` into a bundle's manifest, and other rows into its model; null for none.
    func classify(_ directory: URL, _ section: Json, _ rows: Json) throws {
        let file: URL = directory.appendingPathComponent(ModelBundle.manifestName)
        let manifest: JsonObject = try JsonObject.parse([UInt8](try Data(contentsOf: file)), name: "manifest")
        let model: [JsonMember] = Json.with(try manifest.object("model").members, "label_rows", rows)
        let altered: [JsonMember] = Json.with(
            Json.with(manifest.members, "model", .object(model)), "classifier", section
        )
        try Json.object(altered).written().write(to: file, atomically: true, encoding: .utf8)
    }

    /// Replaces the first `old` in a file.
    func edit(_ file: URL, _ old: String, _ new: String) throws {
        let text: String = try String(contentsOf: file, encoding: .utf8)
        let range: Range<String.Index> = try XCTUnwrap(text.range(of: old), old)
        try text.replacingCharacters(in: range, with: new).write(to: file, atomically: true, encoding: .utf8)
    }

    /// The error that `work` throws, whose text must hold `words`.
    func assertFails(_ words: String, _ work: () throws -> Void, line: UInt = #line) {
        XCTAssertThrowsError(try work(), words, line: line) { (error: any Error) in
            let text: String = (error as? EdgeLlamaError)?.text ?? "not an EdgeLlamaError: \(error)"
            XCTAssertTrue(text.contains(words), text, line: line)
        }
    }
}
