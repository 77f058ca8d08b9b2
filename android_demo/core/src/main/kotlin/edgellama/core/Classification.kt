package edgellama.core

import kotlin.math.exp
import kotlin.math.ln

/**
 * The answer about one text: the most probable label, the first of equal ones. [probabilities] are in the order of the
 * labels. [flagged]: whether the label of the bundle's threshold reaches it; null without a threshold.
 */
class Classification(
    val label: String,
    val probabilities: List<Pair<String, Double>>,
    val flagged: Boolean?,
    val tokens: Int,
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
    fun classify(session: Session, text: String, stopped: () -> Boolean = { false }): Classification? {
        val ids = encode(text)
        session.reset()
        return session.feed(ids, stopped)?.let { answer(it, ids.size) }
    }

    /** The answer that [logits] give after [tokens] tokens. Throws [ModelException] for what is no finite number. */
    fun answer(logits: FloatArray, tokens: Int): Classification {
        if (logits.size != classifier.rows) {
            throw ModelException("the model gave ${logits.size} logits for ${classifier.rows} rows of labels", EXPORT_AGAIN)
        }
        val scores = classifier.scores(logits)
        val probabilities = softmax(scores, calibration?.temperature ?: 1.0)
        if (logits.any { it.isNaN() || it.isInfinite() } || probabilities.any { it.isNaN() }) {
            throw ModelException(
                "the model computed logits that are no finite numbers, so there is no answer",
                "Run the accuracy check; it says whether this device computes the model correctly.",
            )
        }
        var best = 0
        for (label in scores.indices) if (scores[label] > scores[best]) best = label
        val named = classifier.labels.mapIndexed { i, label -> label.name to probabilities[i] }
        val flagged = threshold?.let { least -> named.first { it.first == least.label }.second >= least.probability }
        return Classification(classifier.labels[best].name, named, flagged, tokens)
    }

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
