package edgellama.core

import kotlin.math.exp
import kotlin.math.ln

/**
 * The answer about one text: the most probable label, the first of equal ones. [probabilities] are in the order of the
 * labels. [flagged]: whether the label of the bundle's threshold reaches it; null without a threshold. [categories]:
 * codes of the categories that a guard holds for violated; null for another classifier.
 */
class Classification(
    val label: String,
    val probabilities: List<Pair<String, Double>>,
    val flagged: Boolean?,
    val tokens: Int,
    val categories: List<String>? = null,
)

/** Classifies texts as `edgellama classify` does. */
class TextClassifier internal constructor(
    val classifier: Classifier,
    private val calibration: Calibration?,
    private val tokenizer: Tokenizer,
    private val contextLength: Int,
) {
    /** The threshold of this artifact; null without one. */
    val threshold: Threshold? get() = calibration?.threshold

    /** Token ids that are read for [text]. Throws an [EdgeLlamaException] for one that is empty or does not fit. */
    fun encode(text: String): IntArray = classifier.encode(text, tokenizer, contextLength)

    /**
     * The answer about [text], from one prefill. The text is read from the start, so that no answer depends on the
     * one before. Null when [stopped] said so. Throws an [EdgeLlamaException].
     */
    fun classify(session: Session, text: String, stopped: () -> Boolean = { false }): Classification? =
        classify(session, encode(text), stopped)

    /** The answer of a guard about the last message of a conversation, as about a text. */
    fun classify(session: Session, messages: List<Message>, stopped: () -> Boolean = { false }): Classification? =
        classify(session, classifier.encode(messages, tokenizer, contextLength), stopped)

    private fun classify(session: Session, ids: IntArray, stopped: () -> Boolean): Classification? {
        session.reset()
        val answer = answer(session.feed(ids, stopped) ?: return null, ids.size)
        val guard = classifier.guard ?: return answer
        val isFlagged = answer.flagged == true && threshold?.label == Guard.UNSAFE
        val codes = if (isFlagged || answer.label == Guard.UNSAFE) codes(guard, session, stopped) else emptyList()
        return Classification(answer.label, answer.probabilities, answer.flagged, answer.tokens, codes ?: return null)
    }

    /**
     * Codes after the token `unsafe`, greedily among the tokens that may follow. Those that are complete after
     * [Guard.CALLS] calls count, and so do those before the end of the context. Null when [stopped] said so.
     */
    private fun codes(guard: Guard, session: Session, stopped: () -> Boolean): List<String>? {
        var answer = guard.Answer()
        val pending = arrayListOf(classifier.labels.first { it.name == Guard.UNSAFE }.tokens[0])
        var calls = 0
        while (true) {
            val allowed = answer.allowed()
            var chosen = allowed[0]
            if (allowed.size > 1) {
                if (calls == Guard.CALLS || session.position + pending.size > contextLength) return answer.codes
                if (stopped()) return null
                val logits = checked(session.push(pending.toIntArray()))
                pending.clear()
                calls++
                for (token in allowed) {
                    if (logits[classifier.rowOf.getValue(token)] > logits[classifier.rowOf.getValue(chosen)]) chosen = token
                }
            }
            answer = answer.then(chosen) ?: return answer.codes
            pending.add(chosen)
        }
    }

    /** The answer that [logits] give after [tokens] tokens. Throws [ModelException] for what is no finite number. */
    fun answer(logits: FloatArray, tokens: Int): Classification {
        val scores = classifier.scores(checked(logits))
        val probabilities = softmax(scores, calibration?.temperature ?: 1.0)
        if (probabilities.any { it.isNaN() }) throw broken()
        var best = 0
        for (label in scores.indices) if (scores[label] > scores[best]) best = label
        val named = classifier.labels.mapIndexed { i, label -> label.name to probabilities[i] }
        val flagged = threshold?.let { least -> named.first { it.first == least.label }.second >= least.probability }
        return Classification(classifier.labels[best].name, named, flagged, tokens)
    }

    private fun checked(logits: FloatArray): FloatArray {
        if (logits.size != classifier.rows) {
            throw ModelException("the model gave ${logits.size} logits for ${classifier.rows} rows of labels", EXPORT_AGAIN)
        }
        if (logits.any { it.isNaN() || it.isInfinite() }) throw broken()
        return logits
    }

    private fun broken() = ModelException(
        "the model computed logits that are no finite numbers, so there is no answer",
        "Run the accuracy check; it says whether this device computes the model correctly.",
    )

    private fun softmax(scores: DoubleArray, temperature: Double): DoubleArray {
        val scaled = DoubleArray(scores.size) { scores[it] / temperature }
        val top = scaled.maxOrNull()!!
        val total = ln(scaled.sumOf { exp(it - top) })
        return DoubleArray(scaled.size) { exp(scaled[it] - top - total) }
    }

    companion object {
        /**
         * The classifier of the artifact of [bundle] for [target]. Throws [BundleException] for a bundle that does not
         * classify, and for a calibration of another artifact.
         */
        fun of(bundle: Bundle, target: String, tokenizer: Tokenizer): TextClassifier {
            val classifier = bundle.classifier ?: throw BundleException(
                "${bundle.name} generates text, and has no labels", "Export it with `edgellama export --task classify`.",
            )
            val calibration = classifier.calibration(target)
            val threshold = calibration?.threshold
            if (calibration != null && calibration.artifactSha256 != bundle.artifactSha256(target)) {
                throw Classifier.wrong("its temperature and threshold were computed on another artifact")
            }
            if (threshold != null && classifier.labels.none { it.name == threshold.label }) {
                throw Classifier.wrong("its threshold is of ${threshold.label}, which is no label")
            }
            return TextClassifier(classifier, calibration, tokenizer, bundle.contextLength)
        }
    }
}
