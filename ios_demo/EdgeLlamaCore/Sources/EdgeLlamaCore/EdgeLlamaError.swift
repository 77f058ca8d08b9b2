import Foundation

/// What can go wrong, for a person: `message` says what and why, `remedy` what to do about it.
public struct EdgeLlamaError: Error, Equatable, Sendable {
    public enum Kind: String, Sendable {
        /// Not a bundle, or files in it that are not what its manifest says.
        case bundle
        /// Tokenizer files, or a conversation, that cannot be used.
        case tokenizer
        /// The runtime cannot load or run the artifact.
        case model
        /// More tokens than the context holds.
        case context
        /// A setting without a meaning.
        case settings
    }

    public let kind: Kind
    public let message: String
    public let remedy: String

    public init(_ kind: Kind, _ message: String, remedy: String) {
        self.kind = kind
        self.message = message
        self.remedy = remedy
    }

    /// Both sentences.
    public var text: String { message + "\n" + remedy }

    static let exportAgain: String = "Copy the whole bundle again, or export it again."

    static func bundle(_ message: String, remedy: String = exportAgain) -> EdgeLlamaError {
        EdgeLlamaError(.bundle, message, remedy: remedy)
    }

    static func tokenizer(_ message: String, remedy: String = exportAgain) -> EdgeLlamaError {
        EdgeLlamaError(.tokenizer, message, remedy: remedy)
    }

    static func context(_ message: String) -> EdgeLlamaError {
        EdgeLlamaError(.context, message, remedy: "Clear the chat, shorten the text, or export with a larger --context.")
    }
}

extension EdgeLlamaError: LocalizedError {
    public var errorDescription: String? { text }
}
