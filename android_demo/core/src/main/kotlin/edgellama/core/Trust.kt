package edgellama.core

import java.io.File
import java.io.IOException
import java.security.GeneralSecurityException
import java.security.KeyFactory
import java.security.MessageDigest
import java.security.PublicKey
import java.security.Signature
import java.security.spec.X509EncodedKeySpec

/** The highest version of each bundle that this device has loaded, by the bundle's name. */
interface Versions {
    fun highest(name: String): Long?

    fun loaded(name: String, version: Long)
}

/** Versions in a file of the app's own directory. Throws [BundleException] when it cannot be read or written. */
class FileVersions(private val file: File) : Versions {
    override fun highest(name: String): Long? = read()[name]

    override fun loaded(name: String, version: Long) {
        val versions = read()
        if (version <= (versions[name] ?: -1)) return
        val part = File(file.path + ".part")
        try {
            part.writeText(Json.write(versions + (name to version)))
            if (!part.renameTo(file)) throw IOException("it cannot be replaced")
        } catch (error: IOException) {
            throw unusable(error.message, error)
        }
    }

    private fun read(): Map<String, Long> = try {
        if (!file.exists()) emptyMap() else {
            val json = JsonObject.parse(file.readText(Charsets.UTF_8), file.name)
            json.names.associateWith { json.long(it) }
        }
    } catch (error: IOException) {
        throw unusable(error.message, error)
    }

    private fun unusable(reason: String?, cause: Exception) = BundleException(
        "${file.name}, the list of versions that were loaded, cannot be used ($reason)", "Free some space.", cause,
    )
}

/**
 * What an app loads: bundles whose manifest the owner of one Ed25519 key signed, as `edgellama sign` does. With
 * [versions], a bundle must have a version, and may not be older than the newest of its name that was loaded.
 *
 * The platform's own cryptography does the work. Not every Android has Ed25519: without it, nothing is loaded.
 */
class Trust private constructor(private val key: ByteArray, private val versions: Versions?) {
    /** The version of a manifest with the given signature file; null without one. Throws [BundleException]. */
    fun verify(manifest: ByteArray, signatureFile: ByteArray?): Long? {
        if (signatureFile == null) throw refused("this bundle is not signed")
        val signature = ManifestSignature.parse(signatureFile)
        if (!isSigned(key, ManifestSignature.signedBytes(manifest, signature.version), signature.bytes)) {
            val own = Bundle.hex(MessageDigest.getInstance("SHA-256").digest(key))
            throw refused(
                if (signature.key == own) "this bundle was altered after it was signed"
                else "this bundle was signed with another key",
            )
        }
        return signature.version
    }

    /** Refuses a version that is older than one that was loaded. Throws [BundleException]. */
    fun check(name: String, version: Long?) {
        val highest = versions?.highest(name) ?: -1
        if (versions == null || version != null && version >= highest) return
        throw refused(
            if (version == null) "$name has no version, and this app asks for one"
            else "$name has version $version, and version $highest was already here",
        )
    }

    /** Notes that a bundle runs, after which no older one does. */
    fun loaded(bundle: Bundle) {
        if (versions != null && bundle.version != null) versions.loaded(bundle.name, bundle.version)
    }

    companion object {
        // What precedes the 32 bytes of an Ed25519 key in its X.509 form.
        private val X509 = byteArrayOf(0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00)
        private const val KEY_BYTES = 32
        private const val ALGORITHM = "Ed25519"

        // A key, and its signature of nothing: test 1 of RFC 8032. A platform that rejects it cannot verify.
        private const val KNOWN_KEY = "11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo="
        private const val KNOWN_SIGNATURE =
            "5VZDAMNgrHKQhuLMgG6CioSHfx645dl02HPgZSJJAVVfuIIVkKM7rMYeOXAc+bRr0lv18FlbviRlUUFDjnoQCw=="

        /** Trust in the owner of [publicKey], 64 hexadecimal digits; null for a blank one, which means any bundle. */
        fun of(publicKey: String, versions: Versions? = null): Trust? {
            if (publicKey.isBlank()) return null
            val digits = publicKey.trim()
            if (digits.length != 2 * KEY_BYTES || digits.any { it !in '0'..'9' && it !in 'a'..'f' }) {
                throw BundleException(
                    "this app was built with a public key that is none: \"$publicKey\"",
                    "Build it with the key that `edgellama sign` prints.",
                )
            }
            return Trust(digits.chunked(2).map { it.toInt(16).toByte() }.toByteArray(), versions)
        }

        private fun refused(reason: String) =
            BundleException("$reason, so it is not loaded", "Take the bundle from the people who made this app.")

        private fun isSigned(key: ByteArray, message: ByteArray, signature: ByteArray): Boolean {
            val known = ManifestSignature.base64(KNOWN_KEY)!!
            val platform = try {
                rawVerify(known, ByteArray(0), ManifestSignature.base64(KNOWN_SIGNATURE)!!)
            } catch (_: GeneralSecurityException) {
                false
            } catch (_: RuntimeException) { // a provider that has the name alone
                false
            }
            if (!platform) {
                throw BundleException(
                    "this phone's Android has no Ed25519, with which this app checks who made a bundle",
                    "Use a phone with Android 13 (API 33) or later and its current system updates.",
                )
            }
            return try {
                rawVerify(key, message, signature)
            } catch (_: GeneralSecurityException) {
                false
            }
        }

        private fun rawVerify(key: ByteArray, message: ByteArray, signature: ByteArray): Boolean {
            val public: PublicKey = KeyFactory.getInstance(ALGORITHM).generatePublic(X509EncodedKeySpec(X509 + key))
            return Signature.getInstance(ALGORITHM).run {
                initVerify(public)
                update(message)
                verify(signature)
            }
        }
    }
}
