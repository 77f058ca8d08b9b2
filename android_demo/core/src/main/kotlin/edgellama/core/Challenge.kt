package edgellama.core

import kotlin.math.exp
import kotlin.math.ln

/** Tokens to feed; positions from [scoreFrom] on are answered, as in the golden vectors. */
class ChallengeSequence(val name: String, val tokens: IntArray, val scoreFrom: Int) {
    val scored: Int get() = tokens.size - scoreFrom
}

/** What `edgellama challenge` wrote: schema edgellama.challenge/1. It belongs to one artifact of one bundle. */
class Challenge private constructor(
    val nonce: String,
    val target: String,
    val artifactSha256: String,
    val topK: Int,
    val sequences: List<ChallengeSequence>,
) {
    /** Positions that are answered, for a progress bar. */
    val positions: Int get() = sequences.sumOf { it.scored }

    companion object {
        const val SCHEMA = "edgellama.challenge/1"
        private const val NO_CHALLENGE = "Run the accuracy check, which a classifier has as well."
        private const val MAKE_AGAIN = "Make a challenge with `edgellama challenge` from the bundle on this device."

        /**
         * The challenge in [text], the content of the file called [name], for the artifact of [bundle] for [target].
         * Throws [BundleException] when it is none, or one for something else. Whether it has expired, the host says.
         */
        fun parse(text: String, name: String, bundle: Bundle, target: String): Challenge {
            if (bundle.classifier != null) {
                throw BundleException("${bundle.name} classifies texts, and a challenge is about next tokens", NO_CHALLENGE)
            }
            val json = JsonObject.parse(text, name)
            if (json.stringOrNull("schema") != SCHEMA) {
                throw BundleException("$name: schema is ${json.stringOrNull("schema")}, this app reads $SCHEMA", MAKE_AGAIN)
            }
            val challenge = Challenge(
                json.string("nonce"),
                json.string("target"),
                json.string("artifact_sha256"),
                json.int("top_k"),
                json.objects("sequences").map { sequence(it, name, bundle) },
            )
            if (challenge.target != target) {
                throw BundleException("$name is about the target ${challenge.target}, this app runs $target", MAKE_AGAIN)
            }
            if (challenge.artifactSha256 != bundle.artifactSha256(target)) {
                throw BundleException("$name is about another artifact than that of ${bundle.name}", MAKE_AGAIN)
            }
            if (challenge.topK !in 1 until bundle.vocabSize || challenge.sequences.isEmpty()) {
                throw BundleException("$name asks for ${challenge.topK} tokens at ${challenge.sequences.size} sequences", MAKE_AGAIN)
            }
            return challenge
        }

        private fun sequence(json: JsonObject, name: String, bundle: Bundle): ChallengeSequence {
            val sequence = ChallengeSequence(json.string("name"), json.ints("tokens"), json.int("score_from"))
            val fits = sequence.tokens.size in 1..bundle.contextLength && sequence.scoreFrom in sequence.tokens.indices
            if (!fits || sequence.tokens.any { it >= bundle.vocabSize }) {
                throw BundleException("$name: the sequence ${sequence.name} does not fit this model", MAKE_AGAIN)
            }
            return sequence
        }
    }
}

/**
 * The most probable tokens at a position, best first and of equal ones the smaller id, with their log-probabilities,
 * and the log of the probability of all others: null where that is zero. All are null for broken logits.
 */
class TopTokens private constructor(val ids: IntArray, val logp: List<Double?>, val rest: Double?) {
    companion object {
        /** The [k] most probable tokens of [logits], fewer than all. */
        fun of(logits: FloatArray, k: Int): TopTokens {
            if (logits.any { it.isNaN() || it.isInfinite() }) return TopTokens(IntArray(k) { it }, List(k) { null }, null)
            val order = logits.indices.sortedWith { a, b ->
                if (logits[a] != logits[b]) logits[b].compareTo(logits[a]) else a.compareTo(b)
            }
            val ids = IntArray(k) { order[it] }
            val top = logits[ids[0]].toDouble()
            var inside = 0.0
            for (id in ids) inside += exp(logits[id] - top)
            var outside = 0.0 // summed apart: as a difference it would lose its digits
            for (at in k until order.size) outside += exp(logits[order[at]] - top)
            val total = ln(inside + outside)
            val rest = ln(outside) - total
            return TopTokens(ids, ids.map { logits[it] - top - total }, if (rest.isInfinite()) null else rest)
        }
    }
}

/** The answer to a challenge; [toJson] is the file that `edgellama validate --response` reads. */
class Response(
    private val challenge: Challenge,
    private val runtime: String,
    private val artifactSha256: String,
    val answers: List<List<TopTokens>>,
    val prefillRate: Double?,
    val decodeRate: Double?,
) {
    /** The response, schema edgellama.response/1. */
    fun toJson(device: Device, loadMillis: Double?, peakBytes: Long?): String = Json.write(
        mapOf(
            "schema" to SCHEMA,
            "nonce" to challenge.nonce,
            "target" to challenge.target,
            "family" to null, // the app runs no target that processors round in different ways
            "artifact_sha256" to artifactSha256,
            "device" to device.name,
            "os" to device.os,
            "runtime" to runtime,
            "sequences" to challenge.sequences.zip(answers) { sequence, rows ->
                mapOf(
                    "name" to sequence.name,
                    "ids" to rows.map { it.ids.toList() },
                    "logp" to rows.map { it.logp },
                    "rest" to rows.map { it.rest },
                )
            },
            "prefill_tok_s" to prefillRate,
            "decode_tok_s" to decodeRate,
            "load_ms" to loadMillis,
            "peak_bytes" to peakBytes,
        ),
    )

    companion object {
        const val SCHEMA = "edgellama.response/1"
    }
}

/** Answers a challenge: feeds its tokens as the golden check does, and says what the model holds for probable. */
class ChallengeRun(
    private val bundle: Bundle,
    private val challenge: Challenge,
    private val clock: Clock = Clock.SYSTEM,
) {
    /**
     * Answers everything. [onProgress] hears how many positions are done. Null when [stopped] said so. Throws an
     * [EdgeLlamaException].
     */
    fun run(model: LogitsModel, stopped: () -> Boolean = { false }, onProgress: (Int) -> Unit = {}): Response? {
        val answers = ArrayList<List<TopTokens>>()
        val prefill = Timed(clock)
        val decode = Timed(clock)
        var done = 0
        for (sequence in challenge.sequences) {
            val rows = ArrayList<TopTokens>()
            for (position in sequence.scoreFrom until sequence.tokens.size) {
                if (stopped()) return null
                val isFirst = position == sequence.scoreFrom
                val from = if (isFirst) 0 else position
                val logits = (if (isFirst) prefill else decode).time(position + 1 - from) {
                    model.forward(sequence.tokens.copyOfRange(from, position + 1), from)
                }
                rows.add(TopTokens.of(logits, challenge.topK))
                onProgress(++done)
            }
            answers.add(rows)
        }
        return Response(
            challenge, model.runtime, bundle.artifactSha256(challenge.target), answers, prefill.rate(), decode.rate(),
        )
    }
}
