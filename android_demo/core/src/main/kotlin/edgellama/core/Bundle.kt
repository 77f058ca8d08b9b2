package edgellama.core

import java.io.File
import java.io.IOException
import java.security.MessageDigest

/** One lowered file (or directory) of a bundle, and where it runs. */
data class Artifact(
    val target: String,
    val path: String,
    val bytes: Long,
    val schemes: List<String>,
    val runtime: String,
    val minVersion: String,
    val peakBytes: Long,
)

/** What the gate found when the bundle was exported. KL in nats per token. */
data class Accuracy(val verdict: String, val klMean: Double, val klLow: Double, val klHigh: Double, val top1: Double)

/**
 * An edgellama bundle on disk. Its manifest is read and checked when opened; files are verified when used.
 * [version] is that of the release, if an app with a [Trust] opened it and it has one.
 */
class Bundle private constructor(val directory: File, private val manifest: JsonObject, val version: Long?) {
    private val files = manifest.objectOf("files").entries().mapValues { (name, entry) ->
        checkPath(name)
        FileEntry(entry.long("bytes"), entry.string("sha256"))
    }

    private class FileEntry(val bytes: Long, val sha256: String)

    val name: String = manifest.string("name")
    val recipe: String = manifest.objectOf("recipe").string("name")
    val parameters: Long = manifest.objectOf("source").long("parameters")
    val license: String? = manifest.objectOf("source").stringOrNull("license")
    val vocabSize: Int = manifest.objectOf("model").int("vocab_size")
    val contextLength: Int = manifest.objectOf("model").int("context_length")
    val stopIds: Set<Int> = manifest.objectOf("model").ints("eos_token_ids").toSet()

    /** Labels and prompt of a bundle that classifies texts; null for one that generates text. */
    val classifier: Classifier? = manifest.objectOrNull("classifier")?.let(Classifier::of)

    /** Number of logits of a position: of the labels' rows, or of the vocabulary. */
    val outputSize: Int = classifier?.rows ?: vocabSize

    /** Role prefixes and suffixes; null with [noChatReason] when the model has no chat that an app can write. */
    val chatFormat: ChatFormat? = manifest.objectOf("chat").objectOrNull("format")?.let(ChatFormat::of)
    val noChatReason: String? = manifest.objectOf("chat").stringOrNull("reason")

    val artifacts: List<Artifact> = manifest.objects("artifacts").map { json ->
        val artifact = Artifact(
            json.string("target"),
            json.string("path").also(::checkPath),
            json.long("bytes"),
            json.objects("quantization").map { it.string("scheme") }.distinct(),
            json.objectOf("requires").string("runtime"),
            json.objectOf("requires").string("min_version"),
            json.objectOf("memory").long("peak_estimate"),
        )
        if (under(artifact.path).isEmpty()) throw BundleException("the artifact ${artifact.path} is not among the files")
        artifact
    }

    init {
        val model = manifest.objectOf("model")
        val rows = if (model.isNull("label_rows")) null else model.int("label_rows")
        if (rows != classifier?.rows) throw Classifier.wrong("it has ${classifier?.rows} rows, and its model has $rows")
    }

    /** The artifact for [target]. Throws [BundleException] when there is none. */
    fun artifact(target: String): Artifact = artifacts.firstOrNull { it.target == target }
        ?: throw BundleException(
            "this bundle has no artifact for $target (it has ${artifacts.joinToString { it.target }})",
            "Export it with `edgellama export -t $target`.",
        )

    /** What export measured for [target]; null when it was not validated. */
    fun accuracy(target: String): Accuracy? = manifest.objectOf("accuracy").objectOrNull(target)?.let { json ->
        val interval = json.doubles("kl_mean_ci95")
        Accuracy(json.string("verdict"), json.double("kl_mean"), interval[0], interval[1], json.double("top1_agreement"))
    }

    /** Whether the manifest names the file [path]. */
    fun has(path: String): Boolean = path in files

    /** The hash of the file [path] in the manifest. */
    fun sha256(path: String): String =
        files[path]?.sha256 ?: throw BundleException("${this.name}: no file $path in this bundle")

    /** The artifact's hash; of a directory, of the lines `HASH  PATH` of its files in the order of their paths. */
    fun artifactSha256(target: String): String {
        val path = artifact(target).path
        files[path]?.let { return it.sha256 }
        val lines = under(path).sorted().joinToString("") { "${files.getValue(it).sha256}  ${it.removePrefix("$path/")}\n" }
        return hex(MessageDigest.getInstance("SHA-256").digest(lines.toByteArray(Charsets.UTF_8)))
    }

    /** The file [path], proven to be what the manifest says. [onBytes] hears how many bytes were read. */
    fun file(path: String, onBytes: (Int) -> Unit = {}): File {
        val entry = files[path] ?: throw BundleException("${this.name}: no file $path in this bundle")
        val file = File(directory, path)
        try {
            val inside = file.canonicalPath == File(directory.canonicalFile, path).path
            val problem = when {
                !inside -> "$path is a link"
                !file.isFile -> "$path is missing"
                file.length() != entry.bytes -> "$path has ${file.length()} bytes, the manifest says ${entry.bytes}"
                sha256(file, onBytes) != entry.sha256 -> "$path is not the file that was exported (its hash differs)"
                else -> null
            }
            if (problem != null) throw BundleException("${this.name}: $problem")
        } catch (error: IOException) {
            throw BundleException("${this.name}: $path cannot be read (${error.message})", cause = error)
        }
        return file
    }

    /** The text of the file [path], verified. */
    fun text(path: String): String = file(path).readText(Charsets.UTF_8)

    /** The tokenizer, verified. */
    fun tokenizer(): Tokenizer = Tokenizer.parse(text("tokenizer/tokenizer.json"))

    private fun under(path: String) = files.keys.filter { it == path || it.startsWith("$path/") }

    companion object {
        const val SCHEMA = "edgellama.bundle/1"
        const val MANIFEST = "manifest.json"

        /**
         * The bundle at [directory], its manifest read and checked. With [trust], it must be signed. Throws
         * [BundleException].
         */
        fun open(directory: File, trust: Trust? = null): Bundle {
            val file = File(directory, MANIFEST)
            val signature = File(directory, ManifestSignature.FILE)
            var version: Long? = null
            val text = try {
                if (!file.isFile) {
                    throw BundleException(
                        "${directory.name} is not a bundle (no $MANIFEST)",
                        "Choose a directory that `edgellama export` wrote.",
                    )
                }
                val bytes = file.readBytes()
                if (trust != null) version = trust.verify(bytes, if (signature.isFile) bytesOf(signature) else null)
                bytes.toString(Charsets.UTF_8)
            } catch (error: IOException) {
                throw BundleException("${directory.name}: $MANIFEST cannot be read (${error.message})", cause = error)
            }
            val manifest = JsonObject.parse(text, MANIFEST)
            val schema = manifest.stringOrNull("schema")
            if (schema != SCHEMA) {
                throw BundleException(
                    "$MANIFEST: schema is $schema, this app reads $SCHEMA",
                    "Use an app and an edgellama of the same version.",
                )
            }
            return Bundle(directory, manifest, version).also { trust?.check(it.name, version) }
        }

        /** The beginning of a signature's file, enough to see that it is too long. */
        private fun bytesOf(signature: File): ByteArray = signature.inputStream().use { input ->
            val bytes = ByteArray(ManifestSignature.LONGEST + 1)
            var size = 0
            while (size < bytes.size) {
                val count = input.read(bytes, size, bytes.size - size)
                if (count < 0) break
                size += count
            }
            bytes.copyOf(size)
        }

        /** Refuses a path that leaves the bundle, or that means different files on different systems. */
        internal fun checkPath(path: String) {
            val bad = path.isEmpty() || path.any { it < ' ' || it == '\\' || it.code == 0x7f } ||
                path.split('/').any { it.isEmpty() || it == "." || it == ".." }
            if (bad) throw BundleException("$MANIFEST names the path \"$path\", which may leave the bundle")
        }

        private fun sha256(file: File, onBytes: (Int) -> Unit): String {
            val digest = MessageDigest.getInstance("SHA-256")
            val buffer = ByteArray(1 shl 16)
            file.inputStream().use { input ->
                while (true) {
                    val count = input.read(buffer)
                    if (count < 0) break
                    digest.update(buffer, 0, count)
                    onBytes(count)
                }
            }
            return hex(digest.digest())
        }

        internal fun hex(bytes: ByteArray) =
            bytes.joinToString("") { (it.toInt() and 0xff).toString(16).padStart(2, '0') }
    }
}
