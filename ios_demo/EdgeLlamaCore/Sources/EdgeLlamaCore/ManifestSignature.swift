import Foundation

/// A bundle's signature.json. `version` is that of the release, under the signature; nil without one.
struct ManifestSignature: Sendable {
    static let file: String = "signature.json"
    static let schema: String = "edgellama.signature/1"
    /// Bytes of the file, at most.
    static let longest: Int = 4096
    private static let signatureBytes: Int = 64

    let key: String
    let version: Int?
    let bytes: [UInt8]

    /// The signature in the bytes of the file.
    init(_ text: [UInt8]) throws {
        if text.count > ManifestSignature.longest {
            throw EdgeLlamaError.bundle("\(ManifestSignature.file) is too long for a signature")
        }
        let json: JsonObject = try JsonObject.parse(text, name: ManifestSignature.file)
        let schema: String? = try json.stringOrNil("schema")
        if schema != ManifestSignature.schema {
            throw EdgeLlamaError.bundle(
                "\(ManifestSignature.file): schema is \(schema ?? "missing"), this app reads \(ManifestSignature.schema)"
            )
        }
        key = try json.string("key")
        version = json.isNull("version") ? nil : try json.int("version")
        if let version: Int = version, version < 0 {
            throw EdgeLlamaError.bundle("\(ManifestSignature.file).version is negative")
        }
        let decoded: Data? = Data(base64Encoded: try json.string("signature"))
        guard let data: Data = decoded, data.count == ManifestSignature.signatureBytes else {
            throw EdgeLlamaError.bundle(
                "\(ManifestSignature.file).signature is not \(ManifestSignature.signatureBytes) bytes"
            )
        }
        bytes = [UInt8](data)
    }

    /// The bytes that are signed. A manifest begins with a brace, so it never looks like one with a version.
    static func signedBytes(_ manifest: [UInt8], _ version: Int?) -> [UInt8] {
        guard let version: Int = version else { return manifest }
        return Array("edgellama.version \(version)\n".utf8) + manifest
    }
}
