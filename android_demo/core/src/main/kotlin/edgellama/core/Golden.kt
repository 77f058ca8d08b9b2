package edgellama.core

import java.nio.ByteBuffer
import java.nio.ByteOrder
import kotlin.math.exp
import kotlin.math.ln

/** Tokens to replay; positions from [scoreFrom] on are scored: position i is what the model says after tokens[i]. */
class GoldenSequence(
    val name: String,
    val text: String,
    val addSpecialTokens: Boolean,
    val messages: List<Message>?,
    val tokens: IntArray,
    val scoreFrom: Int,
) {
    val scored: Int get() = tokens.size - scoreFrom
}

/** What a model said on the host: for each position the top k ids with log-probabilities, and the log of the rest. */
class Expectation(private val k: Int, private val ids: IntArray, private val logp: FloatArray, private val rest: FloatArray) {
    /** D(this || logits) at row [row], nats, over the k + 1 buckets. NaN or infinite for broken logits. */
    fun kl(row: Int, logits: FloatArray): Double {
        val top = logits.maxOrNull()!!.toDouble()
        val kept = BooleanArray(logits.size)
        var inside = 0.0
        for (i in row * k until (row + 1) * k) {
            kept[ids[i]] = true
            inside += exp(logits[ids[i]] - top)
        }
        var outside = 0.0 // summed apart: as a difference it would lose its digits
        for (id in logits.indices) if (!kept[id]) outside += exp(logits[id] - top)
        val total = ln(inside + outside)
        var kl = term(rest[row], ln(outside) - total)
        for (i in row * k until (row + 1) * k) kl += term(logp[i], logits[ids[i]] - top - total)
        return if (kl < 0) 0.0 else kl
    }

    /** Whether the most probable token at row [row] is the same. */
    fun top1(row: Int, logits: FloatArray): Boolean {
        var best = 0
        for (id in logits.indices) if (logits[id] > logits[best]) best = id
        return best == ids[row * k]
    }

    private fun term(ours: Float, theirs: Double): Double =
        if (ours == Float.NEGATIVE_INFINITY) 0.0 else exp(ours.toDouble()) * (ours - theirs)
}

class GoldenLimits(val parityKlMean: Double, val parityKlSequence: Double)

/** The golden vectors of a bundle: schema edgellama.golden/1. */
class Golden private constructor(
    val sequences: List<GoldenSequence>,
    val sha256: String,
    private val json: JsonObject,
    private val bundle: Bundle,
) {
    private val k = json.int("top_k")
    private val positions = sequences.sumOf { it.scored }

    fun reference(): Expectation = expectation("reference", k)

    /**
     * The family of processors that [kind] belongs to ([Processor.kind]): processors of one family round [target] alike.
     * Null where all processors do, and in older bundles.
     */
    fun family(target: String, kind: String): String? {
        val artifact = json.objectOf("artifacts").objectOf(target)
        val others = artifact.objectOrNull("families")?.entries() ?: emptyMap()
        return others.entries.firstOrNull { kind in it.value.list("processors") }?.key ?: artifact.stringOrNull("family")
    }

    /** What processors of [family] compute for [target]: the host that exported it, or its replica of another family. */
    fun artifact(target: String, family: String?): Expectation {
        val other = other(target, family) ?: return expectation(target, k)
        return expectation("$target.$family", other.int("top_k"))
    }

    /** The hash of the artifact that was run on the host. */
    fun artifactSha256(target: String): String = json.objectOf("artifacts").objectOf(target).string("sha256")

    fun limits(target: String, family: String?): GoldenLimits {
        val limits = other(target, family)?.objectOf("limits") ?: json.objectOf("limits").objectOf(target)
        return GoldenLimits(limits.double("parity_kl_mean"), limits.double("parity_kl_sequence"))
    }

    /** The entry of a family that the host does not belong to; null for the host's own. */
    private fun other(target: String, family: String?): JsonObject? =
        family?.let { json.objectOf("artifacts").objectOf(target).objectOrNull("families")?.objectOrNull(it) }

    private fun expectation(name: String, k: Int): Expectation {
        val ids = array("$name.ids", "uint32", listOf(positions, k)).let { b -> IntArray(b.remaining() / 4) { b.getInt() } }
        if (ids.any { it < 0 || it >= bundle.outputSize }) throw BundleException("$FILE: $name.ids has ids out of bounds")
        return Expectation(
            k, ids, floats(array("$name.logp", "float32", listOf(positions, k))),
            floats(array("$name.rest", "float32", listOf(positions))),
        )
    }

    private fun floats(buffer: ByteBuffer) = FloatArray(buffer.remaining() / 4) { buffer.getFloat() }

    private fun array(name: String, dtype: String, shape: List<Int>): ByteBuffer {
        val entry = json.objectOf("arrays").objectOf(name)
        val found = entry.ints("shape").toList()
        val path = "$DIRECTORY/${entry.string("file")}"
        if (entry.string("dtype") != dtype || found != shape) {
            throw BundleException("$FILE: $name is ${entry.string("dtype")} $found, expected $dtype $shape")
        }
        if (!bundle.has(path) || bundle.sha256(path) != entry.string("sha256")) {
            throw BundleException("$FILE: $path is not the array that was written")
        }
        val bytes = bundle.file(path).readBytes()
        if (bytes.size != 4 * shape.fold(1, Int::times)) throw BundleException("$FILE: $path has ${bytes.size} bytes")
        return ByteBuffer.wrap(bytes).order(ByteOrder.LITTLE_ENDIAN)
    }

    companion object {
        const val SCHEMA = "edgellama.golden/1"
        private const val DIRECTORY = "golden"
        private const val FILE = "$DIRECTORY/golden.json"

        /** The golden vectors of [bundle], verified. Throws [BundleException]. */
        fun read(bundle: Bundle): Golden {
            if (!bundle.has(FILE)) {
                throw BundleException(
                    "this bundle has no golden vectors, so accuracy cannot be checked",
                    "Export it again with a current edgellama.",
                )
            }
            val json = JsonObject.parse(bundle.text(FILE), FILE)
            if (json.stringOrNull("schema") != SCHEMA) {
                throw BundleException("$FILE: schema is ${json.stringOrNull("schema")}, this app reads $SCHEMA")
            }
            return Golden(json.objects("sequences").map { sequence(it, bundle) }, bundle.sha256(FILE), json, bundle)
        }

        private fun sequence(json: JsonObject, bundle: Bundle): GoldenSequence {
            val sequence = GoldenSequence(
                json.string("name"),
                json.string("text"),
                json.boolean("add_special_tokens"),
                if (json.isNull("messages")) null else json.objects("messages").map(::message),
                json.ints("tokens"),
                json.int("score_from"),
            )
            val fits = sequence.tokens.size in 1..bundle.contextLength && sequence.scoreFrom in sequence.tokens.indices
            if (!fits || sequence.tokens.any { it >= bundle.vocabSize }) {
                throw BundleException("$FILE: the sequence ${sequence.name} does not fit this model")
            }
            return sequence
        }

        private fun message(json: JsonObject): Message {
            val role = Role.entries.firstOrNull { it.label == json.string("role") }
            return Message(role ?: throw BundleException("$FILE: unknown role ${json.string("role")}"), json.string("content"))
        }
    }
}
