package edgellama.core

import kotlin.math.exp
import kotlin.math.ln
import kotlin.math.ln1p

/**
 * One answer of a classifier. [rows]: number of rows of the output layer that mean it, one after the other; they are
 * those of [tokens], which a trained head has none of.
 */
class Label(val name: String, val description: String, val rows: Int, val tokens: List<Int>)

/** Least probability of the label [label] that counts as that label. */
class Threshold(val label: String, val probability: Double)

/** Calibration of the answers of one artifact: scores are divided by [temperature]. */
class Calibration(val artifactSha256: String, val temperature: Double, val threshold: Threshold?)

/** Tokens of a pruned vocabulary below [seen] are those of its corpus; [refusesOthers]: no text with another is read. */
internal class PrunedVocabulary(val seen: Int, val refusesOthers: Boolean)

/** The section `classifier` of a manifest: the meaning of the logits, and the text that is read. */
class Classifier private constructor(
    val labels: List<Label>,
    /** The text before and after the text to classify. */
    val before: String,
    val after: String,
    private val padding: Int?,
    /** Policy and further answers of a safety model; null for another classifier. */
    val guard: Guard?,
    private val vocabulary: PrunedVocabulary?,
    private val calibrations: Map<String, Calibration>,
) {
    /** Rows of the labels. */
    private val labelRows: Int = labels.sumOf { it.rows }

    /** Row of each token; empty for a trained head. Those of a guard's further answers follow those of the labels. */
    internal val rowOf: Map<Int, Int>

    /** Number of logits. */
    val rows: Int

    init {
        val own = labels.flatMap { it.tokens }
        val further = guard?.tokens.orEmpty().filter { it !in own }
        rows = labelRows + further.size
        rowOf = (own + further).withIndex().associate { (row, token) -> token to row }
    }

    /** Temperature and threshold of the artifact for [target]; null without any. */
    fun calibration(target: String): Calibration? = calibrations[target]

    /**
     * Token ids to read for [text], which a guard takes for a message of the user; at most [contextLength]. A control
     * token in it is text. Throws a [ContextException], or a [TokenizerException] for no token or one that a pruned
     * vocabulary refuses.
     */
    fun encode(text: String, tokenizer: Tokenizer, contextLength: Int): IntArray {
        if (guard != null) return encode(listOf(Message(Role.USER, text)), tokenizer, contextLength)
        return encoded(listOf(TextPart(before, false), TextPart(text, true), TextPart(after, false)), tokenizer, contextLength)
    }

    /** Token ids to read for a conversation, whose last message a guard judges. Throws as the other function. */
    fun encode(messages: List<Message>, tokenizer: Tokenizer, contextLength: Int): IntArray {
        val judge = guard ?: throw TokenizerException(
            "this classifier reads one text, and got a conversation", "Give a text, or a bundle of a guard.",
        )
        return encoded(judge.conversation.parts(messages), tokenizer, contextLength)
    }

    private fun encoded(parts: List<TextPart>, tokenizer: Tokenizer, contextLength: Int): IntArray {
        val ids = tokenizer.encode(parts, addSpecialTokens = true)
        var count = ids.size
        while (count > 1 && ids[count - 1] == padding) count-- // the logits after the last other token count
        if (count == 0) throw TokenizerException("the text to classify holds no tokens", "Give a text that is not empty.")
        if (vocabulary != null && vocabulary.refusesOthers) {
            val unseen = ids.take(count).filter { it >= vocabulary.seen }
            if (unseen.isNotEmpty()) {
                throw TokenizerException(
                    "the text holds ${unseen.size} of $count tokens that the corpus of the pruned vocabulary never has",
                    "Export with more texts in --prune-vocabulary, or with --unknown bytes.",
                )
            }
        }
        if (count > contextLength) {
            throw ContextException("the text has $count tokens with its prompt, and the context holds $contextLength")
        }
        return ids.copyOf(count)
    }

    /** Score of each label: the logarithm of the sum of the exponentials of its rows. */
    fun scores(logits: FloatArray): DoubleArray {
        var row = 0
        return DoubleArray(labels.size) { label ->
            var score = logits[row++].toDouble()
            repeat(labels[label].rows - 1) { score = logAddExp(score, logits[row++].toDouble()) }
            score
        }
    }

    companion object {
        private const val TEXT = "{text}"
        private const val SCORE = "score"
        private const val TOKENS = "tokens"

        /** The classifier in the section [json]. Throws [BundleException] for one that this app cannot read. */
        fun of(json: JsonObject): Classifier {
            val head = json.string("head")
            for ((name, known) in mapOf(
                "head" to setOf(SCORE, TOKENS),
                "pooling" to setOf("last"),
                "problem_type" to setOf("single_label_classification"),
            )) {
                val found = json.string(name)
                if (found !in known) throw wrong("its $name is $found, this app reads ${known.joinToString()}")
            }
            val labels = json.objects("labels").map { label(it, head) }
            if (labels.size < 2 || labels.distinctBy { it.name }.size < labels.size || labels.any { it.name.isBlank() }) {
                throw wrong("it has ${labels.size} labels, and needs two or more of different names")
            }
            val prompt = json.string("prompt").split(TEXT)
            if (prompt.size != 2) throw wrong("its prompt holds $TEXT ${prompt.size - 1} times, and needs it once")
            val padding = if (json.isNull("padding")) null else json.int("padding")
            if (padding != null && padding < 0) throw wrong("its padding is $padding, which is no token")
            val calibrations = json.objectOrNull("calibration")?.entries().orEmpty().mapValues { calibration(it.value) }
            val guard = json.objectOrNull("guard")?.let(Guard::of)
            if (guard != null && (head != TOKENS || labels.none { it.name == Guard.UNSAFE })) {
                throw wrong("it is a guard without a token for the label ${Guard.UNSAFE}")
            }
            val vocabulary = json.objectOrNull("vocabulary")?.let(::vocabulary)
            return Classifier(labels, prompt[0], prompt[1], padding, guard, vocabulary, calibrations)
        }

        private fun vocabulary(json: JsonObject): PrunedVocabulary {
            val rule = json.string("unknown")
            if (rule != "refuse" && rule != "bytes") throw wrong("its rule for unknown tokens is $rule")
            val seen = json.int("seen")
            if (seen < 1) throw wrong("its pruned vocabulary has $seen tokens of a corpus")
            return PrunedVocabulary(seen, rule == "refuse")
        }

        private fun label(json: JsonObject, head: String): Label {
            val texts = json.list("texts").size
            val tokens = json.ints("tokens").toList()
            val name = json.string("label")
            if (head == SCORE) return Label(name, json.string("description"), 1, emptyList())
            if (tokens.isEmpty() || tokens.size != texts) {
                throw wrong("its label $name has ${tokens.size} tokens for $texts texts")
            }
            return Label(name, json.string("description"), tokens.size, tokens)
        }

        private fun calibration(json: JsonObject): Calibration {
            val threshold = json.objectOrNull("threshold")?.let { Threshold(it.string("label"), it.double("probability")) }
            val temperature = json.double("temperature")
            if (!(temperature > 0 && temperature <= MAX_TEMPERATURE)) throw wrong("its temperature is $temperature")
            if (threshold != null && threshold.probability !in 0.0..1.0) {
                throw wrong("its threshold is ${threshold.probability}, which is no probability")
            }
            return Calibration(json.string("artifact_sha256"), temperature, threshold)
        }

        private const val MAX_TEMPERATURE = 1e38 // of the manifest's schema

        internal fun wrong(reason: String) = BundleException("this app cannot read the classifier of this bundle: $reason")

        /** ln(exp(a) + exp(b)), as numpy computes it. */
        private fun logAddExp(a: Double, b: Double): Double =
            if (a == b) a + ln(2.0) else maxOf(a, b) + ln1p(exp(-kotlin.math.abs(a - b)))
    }
}
