package edgellama.core

import org.junit.Rule
import org.junit.Test
import org.junit.rules.TemporaryFolder
import java.io.File
import java.security.KeyFactory
import java.security.Signature
import java.security.spec.PKCS8EncodedKeySpec
import java.util.Base64
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue

/** Versions in memory. */
private class KnownVersions(vararg known: Pair<String, Long>) : Versions {
    val all = mutableMapOf(*known)

    override fun highest(name: String) = all[name]

    override fun loaded(name: String, version: Long) {
        all[name] = version
    }
}

class TrustTest {
    @get:Rule
    val folder = TemporaryFolder()

    private val json = Vectors.json("signatures.json")
    private val publicKey = json.string("public_key")

    /** A copy of the vectors' bundle that the key of the vectors signed. */
    private fun signed(version: Long?): File {
        val directory = folder.newFolder()
        File(Vectors.directory, "bundle").copyRecursively(directory, true)
        val seed = Base64.getDecoder().decode(json.string("private_key"))
        val head = byteArrayOf(0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20)
        val key = KeyFactory.getInstance("Ed25519").generatePrivate(PKCS8EncodedKeySpec(head + seed))
        val bytes = Signature.getInstance("Ed25519").run {
            initSign(key)
            update(ManifestSignature.signedBytes(File(directory, Bundle.MANIFEST).readBytes(), version))
            sign()
        }
        val file = mapOf(
            "schema" to ManifestSignature.SCHEMA, "key" to json.string("key"), "version" to version,
            "signature" to Base64.getEncoder().encodeToString(bytes),
        )
        File(directory, ManifestSignature.FILE).writeText(Json.write(file))
        return directory
    }

    @Test
    fun verifiesAsPython() {
        val cases = json.objects("cases")
        assertTrue(cases.size > 15)
        for (case in cases) {
            val name = case.string("name")
            val asked = if (case.isNull("min_version")) null else KnownVersions("bundle" to case.long("min_version"))
            val trust = Trust.of(case.string("public_key"), asked)!!
            val manifest = case.string("manifest").toByteArray()
            val check = {
                val version = trust.verify(manifest, case.stringOrNull("signature_file")?.toByteArray())
                trust.check("bundle", version)
                version
            }
            if (case.boolean("accepted")) {
                assertEquals(if (case.isNull("version")) null else case.long("version"), check(), name)
            } else {
                assertFailsWith<BundleException>(name) { check() }
            }
        }
    }

    @Test
    fun aSignedBundleOpensAndAnAlteredOneDoesNot() {
        val trust = Trust.of(publicKey)
        assertEquals(3, Bundle.open(signed(3), trust).version)
        assertEquals(null, Bundle.open(signed(null), trust).version)
        val alterations = mapOf<String, (File) -> Unit>(
            "altered after it was signed" to { directory ->
                val manifest = File(directory, Bundle.MANIFEST)
                manifest.writeText(manifest.readText().replace("\"bytes\": 51", "\"bytes\": 52"))
            },
            "is not signed" to { directory -> check(File(directory, ManifestSignature.FILE).delete()) },
            "too long" to { directory -> File(directory, ManifestSignature.FILE).appendText(" ".repeat(5000)) },
            "is not a bundle" to { directory -> check(File(directory, Bundle.MANIFEST).delete()) },
        )
        for ((words, alter) in alterations) {
            val directory = signed(3).also(alter)
            val error = assertFailsWith<BundleException>(words) { Bundle.open(directory, trust) }
            assertTrue(words in error.text, error.text)
        }
        val directory = signed(3)
        File(directory, "xnnpack/model.pte").let { it.writeBytes(it.readBytes().also { bytes -> bytes[3]++ }) }
        assertFailsWith<BundleException> { Bundle.open(directory, trust).file("xnnpack/model.pte") }
        val other = Trust.of("09".repeat(32))
        assertTrue("another key" in assertFailsWith<BundleException> { Bundle.open(signed(3), other) }.text)
    }

    @Test
    fun anOlderBundleIsRefusedOnceANewerOneRan() {
        val file = File(folder.newFolder(), "versions.json")
        val trust = Trust.of(publicKey, FileVersions(file))!!
        val four = signed(4)
        val two = signed(2)
        trust.loaded(Bundle.open(two, trust))
        assertEquals(4, Bundle.open(four, trust).version)
        assertEquals(2, Bundle.open(two, trust).version, "a newer one that was only looked at changes nothing")
        trust.loaded(Bundle.open(four, trust))
        val again = Trust.of(publicKey, FileVersions(file))
        assertEquals(4, Bundle.open(four, again).version)
        for ((directory, words) in listOf(two to "has version 2, and version 4 was", signed(null) to "has no version")) {
            val error = assertFailsWith<BundleException> { Bundle.open(directory, again) }
            assertTrue(words in error.text, error.text)
        }
        file.writeText("{\"vectors\": \"4\"}")
        assertFailsWith<BundleException>("a damaged list is no reason to accept") { Bundle.open(four, again) }
    }

    @Test
    fun aBlankKeyIsNoTrustAndADamagedOneIsRefused() {
        assertEquals(null, Trust.of(" "))
        for (key in listOf("x", "${publicKey}00", publicKey.drop(2), publicKey.replace('0', 'g'), publicKey.uppercase())) {
            assertFailsWith<BundleException>(key) { Trust.of(key) }
        }
    }
}
