import Foundation

#if canImport(CryptoKit)
import CryptoKit
#endif

/// What an app loads: bundles whose manifest the owner of one Ed25519 key signed, as `edgellama sign` does. With
/// versions, a bundle must have one, and may not be older than the newest of its name that was loaded.
///
/// CryptoKit does the work. Where it is missing, on other systems than Apple's, nothing is loaded.
public struct Trust: Sendable {
    private static let keyBytes: Int = 32

    private let key: [UInt8]
    private let versions: (any Versions)?

    /// Trust in the owner of `publicKey`, 64 hexadecimal digits; nil for a blank one, which means any bundle.
    public init?(publicKey: String, versions: (any Versions)? = nil) throws {
        let digits: [UInt8] = Array(publicKey.trimmingCharacters(in: .whitespacesAndNewlines).utf8)
        if digits.isEmpty { return nil }
        var key: [UInt8] = []
        for pair in stride(from: 0, to: digits.count - 1, by: 2) {
            guard let high: UInt8 = Trust.value(digits[pair]), let low: UInt8 = Trust.value(digits[pair + 1]) else { break }
            key.append(high << 4 | low)
        }
        if digits.count != 2 * Trust.keyBytes || key.count != Trust.keyBytes {
            throw EdgeLlamaError.bundle(
                "this app was built with a public key that is none: \"\(publicKey)\"",
                remedy: "Build it with the key that `edgellama sign` prints."
            )
        }
        self.key = key
        self.versions = versions
    }

    /// The value of a hexadecimal digit in lower case.
    private static func value(_ digit: UInt8) -> UInt8? {
        switch digit {
        case 0x30...0x39: return digit - 0x30
        case 0x61...0x66: return digit - 0x61 + 10
        default: return nil
        }
    }

    /// The version of a manifest with the given signature file; nil without one.
    func verify(_ manifest: [UInt8], _ signatureFile: [UInt8]?) throws -> Int? {
        guard let file: [UInt8] = signatureFile else { throw Trust.refused("this bundle is not signed") }
        let signature: ManifestSignature = try ManifestSignature(file)
        let message: [UInt8] = ManifestSignature.signedBytes(manifest, signature.version)
        if try !Trust.isSigned(key, message, signature.bytes) {
            throw Trust.refused(
                signature.key == Sha256.hex(key)
                    ? "this bundle was altered after it was signed" : "this bundle was signed with another key"
            )
        }
        return signature.version
    }

    /// Refuses a version that is older than one that was loaded.
    func check(_ name: String, _ version: Int?) throws {
        guard let versions: any Versions = versions else { return }
        let highest: Int? = try versions.highest(name)
        guard let version: Int = version else { throw Trust.refused("\(name) has no version, and this app asks for one") }
        if let highest: Int = highest, version < highest {
            throw Trust.refused("\(name) has version \(version), and version \(highest) was already here")
        }
    }

    /// Notes that a bundle runs, after which no older one does.
    public func loaded(_ bundle: ModelBundle) throws {
        if let versions: any Versions = versions, let version: Int = bundle.version {
            try versions.loaded(bundle.name, version)
        }
    }

    private static func refused(_ reason: String) -> EdgeLlamaError {
        EdgeLlamaError.bundle(
            "\(reason), so it is not loaded", remedy: "Take the bundle from the people who made this app."
        )
    }

    private static func isSigned(_ key: [UInt8], _ message: [UInt8], _ signature: [UInt8]) throws -> Bool {
        #if canImport(CryptoKit)
        guard let publicKey: Curve25519.Signing.PublicKey = try? Curve25519.Signing.PublicKey(
            rawRepresentation: Data(key)
        ) else { return false }
        return publicKey.isValidSignature(Data(signature), for: Data(message))
        #else
        throw EdgeLlamaError.bundle(
            "this system has no CryptoKit, with which this app checks who made a bundle",
            remedy: "Use a device of Apple's."
        )
        #endif
    }
}
