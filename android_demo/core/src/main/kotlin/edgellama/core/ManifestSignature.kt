package edgellama.core

import java.util.Base64

/** A bundle's signature.json. [version] is that of the release, under the signature; null without one. */
internal class ManifestSignature(val key: String, val version: Long?, val bytes: ByteArray) {
    companion object {
        const val FILE = "signature.json"
        const val SCHEMA = "edgellama.signature/1"
        const val LONGEST = 4096 // bytes of the file
        private const val SIGNATURE_BYTES = 64

        /** The signature in the bytes of the file. Throws [BundleException]. */
        fun parse(file: ByteArray): ManifestSignature {
            if (file.size > LONGEST) throw BundleException("$FILE is too long for a signature")
            val json = JsonObject.parse(file.toString(Charsets.UTF_8), FILE)
            val schema = json.stringOrNull("schema")
            if (schema != SCHEMA) throw BundleException("$FILE: schema is $schema, this app reads $SCHEMA")
            val version = if (json.isNull("version")) null else json.long("version")
            if (version != null && version < 0) throw BundleException("$FILE.version is negative")
            val bytes = base64(json.string("signature"))
            if (bytes?.size != SIGNATURE_BYTES) throw BundleException("$FILE.signature is not $SIGNATURE_BYTES bytes")
            return ManifestSignature(json.string("key"), version, bytes)
        }

        /** The bytes that are signed. A manifest begins with a brace, so it never looks like one with a version. */
        fun signedBytes(manifest: ByteArray, version: Long?): ByteArray =
            if (version == null) manifest else "edgellama.version $version\n".toByteArray() + manifest

        /** The bytes of a base64 text; null for another text. */
        fun base64(text: String): ByteArray? = try {
            Base64.getDecoder().decode(text)
        } catch (_: IllegalArgumentException) {
            null
        }
    }
}
