package edgellama.core

import org.junit.Rule
import org.junit.Test
import org.junit.rules.TemporaryFolder
import java.io.File
import java.nio.file.Files
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue

class BundleTest {
    @get:Rule
    val folder = TemporaryFolder()

    private fun copy(): File = folder.newFolder().also { File(Vectors.directory, "bundle").copyRecursively(it, true) }

    @Test
    fun readsTheManifest() {
        val bundle = Vectors.bundle()
        assertEquals("vectors", bundle.name)
        assertEquals(512, bundle.vocabSize)
        assertEquals(64, bundle.contextLength)
        assertEquals(setOf(2, 0), bundle.stopIds)
        assertEquals("int4-fast", bundle.recipe)
        assertEquals(listOf("int4"), bundle.artifact("xnnpack").schemes)
        assertEquals(null, bundle.accuracy("xnnpack"))
        val expected = Vectors.json("golden.json")
        assertEquals(expected.string("artifact_sha256"), bundle.artifactSha256("xnnpack"))
        assertEquals(expected.string("golden_sha256"), bundle.sha256("golden/golden.json"))
        assertFailsWith<BundleException> { bundle.artifact("coreml") }
        var read = 0
        assertEquals(bundle.artifact("xnnpack").bytes, bundle.file("xnnpack/model.pte") { read += it }.length())
        assertEquals(51, read)
    }

    @Test
    fun hashesADirectoryByItsFiles() {
        val directory = copy()
        val manifest = File(directory, "manifest.json")
        // The same two files as an artifact of several files, as an .mlpackage is.
        val text = manifest.readText().replace("\"path\": \"xnnpack/model.pte\"", "\"path\": \"golden\"")
        manifest.writeText(text)
        val bundle = Bundle.open(directory)
        val names = File(directory, "golden").list()!!.sorted()
        val lines = names.joinToString("") { "${bundle.sha256("golden/$it")}  $it\n" }
        val digest = java.security.MessageDigest.getInstance("SHA-256").digest(lines.toByteArray())
        assertEquals(Bundle.hex(digest), bundle.artifactSha256("xnnpack"))
    }

    @Test
    fun noticesFilesThatChanged() {
        val path = "xnnpack/model.pte"
        val damages = mapOf<String, (File) -> Unit>(
            "hash differs" to { file -> file.writeBytes(file.readBytes().also { it[3]++ }) },
            "52 bytes" to { file -> file.appendText("x") },
            "is missing" to { file -> check(file.delete()) },
            "is a link" to { file ->
                val other = File(file.parentFile, "other")
                check(file.renameTo(other))
                Files.createSymbolicLink(file.toPath(), other.toPath())
            },
        )
        for ((message, damage) in damages) {
            val directory = copy()
            damage(File(directory, path))
            val error = assertFailsWith<BundleException>(message) { Bundle.open(directory).file(path) }
            assertTrue(message in error.text, error.text)
        }
    }

    @Test
    fun refusesPathsThatLeaveTheBundle() {
        for (path in listOf("../x", "/etc/passwd", "a/../../x", "a//b", "./a", "a\\\\b", "a/", "", "a\\u0000b", "..")) {
            val directory = copy()
            val manifest = File(directory, "manifest.json")
            manifest.writeText(manifest.readText().replace("\"tokenizer/tokenizer.json\": {", "\"$path\": {"))
            val error = assertFailsWith<BundleException>(path) { Bundle.open(directory) }
            assertTrue("may leave the bundle" in error.text, error.text)
        }
        val directory = copy()
        assertFailsWith<BundleException> { Bundle.open(directory).file("../bundle/manifest.json") }
    }

    @Test
    fun refusesWhatIsNoBundleOfThisVersion() {
        assertTrue("is not a bundle" in assertFailsWith<BundleException> { Bundle.open(folder.newFolder()) }.text)
        for ((from, to, message) in listOf(
            Triple("edgellama.bundle/1", "edgellama.bundle/2", "this app reads edgellama.bundle/1"),
            Triple("\"context_length\": 64", "\"context_length\": \"64\"", "context_length is not a whole number"),
            Triple("\"path\": \"xnnpack/model.pte\"", "\"path\": \"xnnpack/other.pte\"", "not among the files"),
            Triple("{", "", "not JSON"),
        )) {
            val directory = copy()
            val manifest = File(directory, "manifest.json")
            val text = manifest.readText()
            assertTrue(from in text, from)
            manifest.writeText(text.replaceFirst(from, to))
            val error = assertFailsWith<BundleException>(message) { Bundle.open(directory) }
            assertTrue(message in error.text, error.text)
        }
    }
}
