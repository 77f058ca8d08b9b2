import Foundation
import XCTest

@testable import EdgeLlamaCore

final class BundleTests: XCTestCase {
    func testReadsTheManifest() throws {
        let bundle: ModelBundle = try Vectors.bundle()
        XCTAssertEqual(bundle.name, "vectors")
        XCTAssertEqual(bundle.vocabSize, 512)
        XCTAssertEqual(bundle.contextLength, 64)
        XCTAssertEqual(bundle.stopIds, [2, 0])
        XCTAssertEqual(bundle.recipe, "int4-fast")
        XCTAssertEqual(bundle.coremlProfile, "gpu")
        XCTAssertEqual(try bundle.artifact("xnnpack").schemes, ["int4"])
        XCTAssertNil(bundle.accuracy("xnnpack"))
        XCTAssertNotNil(bundle.chatFormat)
        let expected: JsonObject = try Vectors.json("golden.json")
        XCTAssertEqual(try bundle.artifactSha256("xnnpack"), try expected.string("artifact_sha256"))
        XCTAssertEqual(try bundle.sha256("golden/golden.json"), try expected.string("golden_sha256"))
        assertFails("no artifact for coreml") { _ = try bundle.artifact("coreml") }
        var read: Int = 0
        let file: URL = try bundle.artifactFile("xnnpack") { read += $0 }
        XCTAssertEqual(try Data(contentsOf: file).count, 51)
        XCTAssertEqual(read, 51)
    }

    /// EDGELLAMA_BUNDLE: a bundle that `edgellama export` wrote, which tests/apps/test_ios_core.py names.
    func testReadsABundleThatWasExported() throws {
        guard let path: String = ProcessInfo.processInfo.environment["EDGELLAMA_BUNDLE"], !path.isEmpty else {
            throw XCTSkip("EDGELLAMA_BUNDLE names no bundle")
        }
        let bundle: ModelBundle = try ModelBundle(URL(fileURLWithPath: path, isDirectory: true))
        let golden: Golden = try Golden(bundle)
        let tokenizer: Tokenizer = try bundle.tokenizer()
        XCTAssertFalse(bundle.artifacts.isEmpty)
        for artifact in bundle.artifacts {
            _ = try bundle.artifactFile(artifact.target)
            XCTAssertEqual(bundle.accuracy(artifact.target)?.verdict, "pass")
            XCTAssertEqual(try bundle.artifactSha256(artifact.target), try golden.artifactSha256(artifact.target))
            XCTAssertGreaterThan(try golden.limits(artifact.target, nil).mean, 0)
            XCTAssertEqual(try golden.artifact(artifact.target, nil).rest.count, golden.positions)
        }
        for sequence in golden.sequences {
            let ids: [Int] = tokenizer.encode(sequence.text, addSpecialTokens: sequence.addSpecialTokens)
            XCTAssertEqual(ids, sequence.tokens, sequence.name)
        }
    }

    func testHashesADirectoryByItsFiles() throws {
        let directory: URL = try copyOfBundle()
        // The golden files as an artifact of several files, as an .mlpackage is.
        try edit(
            directory.appendingPathComponent("manifest.json"), "\"path\": \"xnnpack/model.pte\"", "\"path\": \"golden\""
        )
        let bundle: ModelBundle = try ModelBundle(directory)
        let names: [String] = try FileManager.default.contentsOfDirectory(
            atPath: directory.appendingPathComponent("golden").path
        ).sorted()
        let lines: String = try names.map { "\(try bundle.sha256("golden/" + $0))  \($0)\n" }.joined()
        XCTAssertEqual(try bundle.artifactSha256("xnnpack"), Sha256.hex(Array(lines.utf8)))
        XCTAssertEqual(try bundle.artifactFile("xnnpack").lastPathComponent, "golden")
        try Data([1]).write(to: directory.appendingPathComponent("golden/xnnpack.rest.bin"))
        assertFails("xnnpack.rest.bin has 1 bytes") { _ = try bundle.artifactFile("xnnpack") }
    }

    func testNoticesFilesThatChanged() throws {
        let files: FileManager = FileManager.default
        let damages: [(String, (URL) throws -> Void)] = [
            (
                "hash differs",
                { file in
                    var data: Data = try Data(contentsOf: file)
                    data[3] = data[3] &+ 1
                    try data.write(to: file)
                }
            ),
            ("52 bytes", { file in try (try Data(contentsOf: file) + Data([0])).write(to: file) }),
            ("is missing", { file in try files.removeItem(at: file) }),
            (
                "is a link",
                { file in
                    let other: URL = file.deletingLastPathComponent().appendingPathComponent("other")
                    try files.moveItem(at: file, to: other)
                    try files.createSymbolicLink(at: file, withDestinationURL: other)
                }
            ),
            (
                "is a link",
                { file in
                    let folder: URL = file.deletingLastPathComponent()
                    let other: URL = folder.deletingLastPathComponent().appendingPathComponent("elsewhere")
                    try files.moveItem(at: folder, to: other)
                    try files.createSymbolicLink(at: folder, withDestinationURL: other)
                }
            ),
        ]
        for (words, damage) in damages {
            let directory: URL = try copyOfBundle()
            try damage(directory.appendingPathComponent("xnnpack/model.pte"))
            let bundle: ModelBundle = try ModelBundle(directory)
            assertFails(words) { _ = try bundle.file("xnnpack/model.pte") }
        }
    }

    func testRefusesPathsThatLeaveTheBundle() throws {
        for path in ["../x", "/etc/passwd", "a/../../x", "a//b", "./a", #"a\\b"#, "a/", "", #"a\u0000b"#, ".."] {
            let directory: URL = try copyOfBundle()
            try edit(
                directory.appendingPathComponent("manifest.json"), "\"tokenizer/tokenizer.json\": {", "\"\(path)\": {"
            )
            assertFails("may leave the bundle") { _ = try ModelBundle(directory) }
        }
        assertFails("no file") { _ = try Vectors.bundle().file("../bundle/manifest.json") }
    }

    func testRefusesWhatIsNoBundleOfThisVersion() throws {
        let nowhere: URL = FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString)
        assertFails("is not a bundle") { _ = try ModelBundle(nowhere) }
        for (old, new, words) in [
            ("edgellama.bundle/1", "edgellama.bundle/2", "this app reads edgellama.bundle/1"),
            ("\"context_length\": 64", "\"context_length\": \"64\"", "context_length is not a whole number"),
            ("\"path\": \"xnnpack/model.pte\"", "\"path\": \"xnnpack/other.pte\"", "not among the files"),
            ("{", "", "not JSON"),
        ] {
            let directory: URL = try copyOfBundle()
            try edit(directory.appendingPathComponent("manifest.json"), old, new)
            assertFails(words) { _ = try ModelBundle(directory) }
        }
    }
}
