import Foundation
import XCTest

@testable import EdgeLlamaCore

#if canImport(CryptoKit)
import CryptoKit
#endif

/// A version that was loaded.
private struct KnownVersions: Versions {
    let version: Int

    func highest(_ name: String) -> Int? { version }
    func loaded(_ name: String, _ version: Int) {}
}

final class TrustTests: XCTestCase {
    private func vectors() throws -> JsonObject { try Vectors.json("signatures.json") }

    private func trust(_ versions: (any Versions)? = nil) throws -> Trust {
        try XCTUnwrap(try Trust(publicKey: try vectors().string("public_key"), versions: versions))
    }

    #if canImport(CryptoKit)
    func testVerifiesAsPython() throws {
        let cases: [JsonObject] = try vectors().objects("cases")
        XCTAssertGreaterThan(cases.count, 15)
        for item in cases {
            let name: String = try item.string("name")
            let asked: KnownVersions? = item.isNull("min_version")
                ? nil : KnownVersions(version: try item.int("min_version"))
            let trust: Trust = try XCTUnwrap(
                try Trust(publicKey: try item.string("public_key"), versions: asked)
            )
            let manifest: [UInt8] = Array(try item.string("manifest").utf8)
            let file: [UInt8]? = try item.stringOrNil("signature_file").map { Array($0.utf8) }
            func check() throws -> Int? {
                let version: Int? = try trust.verify(manifest, file)
                try trust.check("bundle", version)
                return version
            }
            if try item.bool("accepted") {
                XCTAssertEqual(try check(), item.isNull("version") ? nil : try item.int("version"), name)
            } else {
                XCTAssertThrowsError(try check(), name)
            }
        }
    }

    /// A copy of the vectors' bundle that the key of the vectors signed.
    private func signed(_ version: Int?) throws -> URL {
        let directory: URL = try copyOfBundle()
        let seed: Data = try XCTUnwrap(Data(base64Encoded: try vectors().string("private_key")))
        let key: Curve25519.Signing.PrivateKey = try Curve25519.Signing.PrivateKey(rawRepresentation: seed)
        let manifest: Data = try Data(contentsOf: directory.appendingPathComponent("manifest.json"))
        let message: [UInt8] = ManifestSignature.signedBytes([UInt8](manifest), version)
        let file: Json = .object([
            "schema": .string(ManifestSignature.schema),
            "key": .string(try vectors().string("key")),
            "version": version.map { Json.int($0) } ?? .null,
            "signature": .string(try key.signature(for: Data(message)).base64EncodedString()),
        ])
        try Data(file.written().utf8).write(to: directory.appendingPathComponent(ManifestSignature.file))
        return directory
    }

    func testASignedBundleOpensAndAnAlteredOneDoesNot() throws {
        let trust: Trust = try trust()
        XCTAssertEqual(try ModelBundle(try signed(3), trust: trust).version, 3)
        XCTAssertNil(try ModelBundle(try signed(nil), trust: trust).version)
        let altered: URL = try signed(3)
        try edit(altered.appendingPathComponent("manifest.json"), "\"bytes\": 51", "\"bytes\": 52")
        assertFails("altered after it was signed") { _ = try ModelBundle(altered, trust: trust) }
        let file: URL = try signed(3)
        try Data([1]).write(to: file.appendingPathComponent("xnnpack/model.pte"))
        assertFails("has 1 bytes") { _ = try ModelBundle(file, trust: trust).artifactFile("xnnpack") }
        let other: Trust? = try Trust(publicKey: String(repeating: "09", count: 32))
        let own: URL = try signed(3)
        assertFails("another key") { _ = try ModelBundle(own, trust: other) }
    }

    func testAnOlderBundleIsRefusedOnceANewerOneRan() throws {
        let four: URL = try signed(4)
        let two: URL = try signed(2)
        let list: URL = two.appendingPathComponent("versions.json")
        let trust: Trust = try trust(FileVersions(list))
        XCTAssertEqual(try ModelBundle(four, trust: trust).version, 4)
        try trust.loaded(try ModelBundle(two, trust: trust))
        try trust.loaded(try ModelBundle(four, trust: trust))
        assertFails("has version 2, and version 4 was") { _ = try ModelBundle(two, trust: trust) }
        let none: URL = try signed(nil)
        assertFails("has no version") { _ = try ModelBundle(none, trust: trust) }
        try Data("{\"vectors\": \"4\"}".utf8).write(to: list)
        assertFails("is not a whole number") { _ = try ModelBundle(four, trust: trust) }
    }
    #endif

    func testAnUnsignedBundleIsRefusedByAnAppWithAKey() throws {
        let directory: URL = try copyOfBundle()
        let trust: Trust = try trust()
        assertFails("is not signed") { _ = try ModelBundle(directory, trust: trust) }
        #if !canImport(CryptoKit)
        let signature: String = try XCTUnwrap(try vectors().objects("cases")[0].stringOrNil("signature_file"))
        try Data(signature.utf8).write(to: directory.appendingPathComponent(ManifestSignature.file))
        assertFails("has no CryptoKit") { _ = try ModelBundle(directory, trust: trust) }
        #endif
    }

    func testABlankKeyIsNoTrustAndADamagedOneIsRefused() throws {
        XCTAssertNil(try Trust(publicKey: " "))
        let key: String = try vectors().string("public_key")
        for damaged in ["x", key + "00", String(key.dropFirst(2)), key.replacingOccurrences(of: "0", with: "g")] {
            assertFails("a public key that is none") { _ = try Trust(publicKey: damaged) }
        }
    }
}
