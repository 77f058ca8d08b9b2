// Declarations of CryptoKit that ios_demo uses, after Apple's public documentation, for the type check on other systems.
import Foundation

public enum Curve25519 {
    public enum Signing {
        public struct PublicKey: Sendable {
            public init<D: ContiguousBytes>(rawRepresentation: D) throws { fatalError("a stub") }

            public func isValidSignature<S: DataProtocol, D: DataProtocol>(_ signature: S, for data: D) -> Bool {
                fatalError("a stub")
            }
        }
    }
}
