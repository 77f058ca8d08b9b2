package edgellama.core

/** What a replayed sequence gave, one entry for each scored position. */
class SequenceResult(
    val name: String,
    val tokensMatch: Boolean,
    val kl: DoubleArray,
    val top1: BooleanArray,
    val parityKl: DoubleArray,
    val parityTop1: BooleanArray,
)

/** One question with its answer. [value] and [limit] are numbers, texts or null. */
class Check(val name: String, val passed: Boolean, val value: Any?, val limit: Any?)

/** The device that ran a check. Figures that it cannot tell are null. */
class Device(val name: String, val os: String)

/** The result of an accuracy check; [toJson] is the device log that `edgellama validate --device-log` reads. */
class GoldenResult(
    val target: String,
    val family: String?,
    val runtime: String,
    val artifactSha256: String,
    val goldenSha256: String,
    val sequences: List<SequenceResult>,
    val checks: List<Check>,
    val prefillRate: Double?,
    val decodeRate: Double?,
) {
    val passed: Boolean get() = checks.all { it.passed }
    val klMean: Double get() = mean(sequences.map { it.kl })
    val parityKlMean: Double get() = mean(sequences.map { it.parityKl })
    val top1: Double get() = share(sequences.map { it.top1 })
    val parityTop1: Double get() = share(sequences.map { it.parityTop1 })

    /** The log, schema edgellama.device/1. */
    fun toJson(device: Device, loadMillis: Double?, peakBytes: Long?): String = Json.write(
        mapOf(
            "schema" to SCHEMA,
            "device" to device.name,
            "os" to device.os,
            "runtime" to runtime,
            "target" to target,
            "family" to family,
            "artifact_sha256" to artifactSha256,
            "golden_sha256" to goldenSha256,
            "sequences" to sequences.map {
                mapOf(
                    "name" to it.name,
                    "tokens_match" to it.tokensMatch,
                    "kl" to it.kl.toList(),
                    "top1" to it.top1.toList(),
                    "parity_kl" to it.parityKl.toList(),
                    "parity_top1" to it.parityTop1.toList(),
                )
            },
            "kl_mean" to klMean,
            "parity_kl_mean" to parityKlMean,
            "top1_agreement" to top1,
            "parity_top1_agreement" to parityTop1,
            "prefill_tok_s" to prefillRate,
            "decode_tok_s" to decodeRate,
            "load_ms" to loadMillis,
            "peak_bytes" to peakBytes,
            "checks" to checks.map {
                mapOf(
                    "name" to it.name,
                    "value" to it.value,
                    "limit" to it.limit,
                    "verdict" to if (it.passed) "pass" else "fail",
                )
            },
            "verdict" to if (passed) "pass" else "fail",
        ),
    )

    companion object {
        const val SCHEMA = "edgellama.device/1"

        internal fun mean(parts: List<DoubleArray>): Double = parts.sumOf { it.sum() } / parts.sumOf { it.size }

        private fun share(parts: List<BooleanArray>): Double =
            parts.sumOf { part -> part.count { it } }.toDouble() / parts.sumOf { it.size }
    }
}

/**
 * The accuracy check: feeds the golden sequences to the model and compares its logits with the host's.
 *
 * A KL that is no number fails every limit, and so does a tokenizer that gives other tokens than the host's.
 *
 * [kind] is the kind of this device's processor ([Processor.kind]), which decides with which rows it is compared.
 */
class GoldenCheck(
    private val bundle: Bundle,
    private val target: String,
    kind: String,
    private val clock: Clock = Clock.SYSTEM,
) {
    private val golden = Golden.read(bundle)
    private val family = golden.family(target, kind)

    /** Positions that [run] scores, for a progress bar. */
    val positions: Int = golden.sequences.sumOf { it.scored }

    /**
     * Replays everything. [onProgress] hears how many positions are done and of which sequence the result is there.
     * Null when [stopped] said so. Throws an [EdgeLlamaException].
     */
    fun run(
        model: LogitsModel,
        tokenizer: Tokenizer,
        stopped: () -> Boolean = { false },
        onProgress: (Int, SequenceResult?) -> Unit = { _, _ -> },
    ): GoldenResult? {
        val reference = golden.reference()
        val host = golden.artifact(target, family)
        val results = ArrayList<SequenceResult>()
        val prefill = Timed(clock)
        val decode = Timed(clock)
        var row = 0
        for (sequence in golden.sequences) {
            val first = row
            val result = SequenceResult(
                sequence.name,
                tokens(sequence, tokenizer).contentEquals(sequence.tokens),
                DoubleArray(sequence.scored),
                BooleanArray(sequence.scored),
                DoubleArray(sequence.scored),
                BooleanArray(sequence.scored),
            )
            for (i in 0 until sequence.scored) {
                if (stopped()) return null
                val position = sequence.scoreFrom + i
                var from = if (i == 0) 0 else position
                while (position + 1 - from > Session.PIECE) {
                    prefill.time(Session.PIECE) { model.forward(sequence.tokens.copyOfRange(from, from + Session.PIECE), from) }
                    from += Session.PIECE
                    if (stopped()) return null
                }
                val logits = (if (i == 0) prefill else decode).time(position + 1 - from) {
                    model.forward(sequence.tokens.copyOfRange(from, position + 1), from)
                }
                measure(logits, bundle.outputSize)
                result.kl[i] = reference.kl(row, logits)
                result.top1[i] = reference.top1(row, logits)
                result.parityKl[i] = host.kl(row, logits)
                result.parityTop1[i] = host.top1(row, logits)
                row++
                onProgress(row, if (row == first + sequence.scored) result else null)
            }
            results.add(result)
        }
        return GoldenResult(
            target, family, model.runtime, bundle.artifactSha256(target), golden.sha256, results, judge(results),
            prefill.rate(), decode.rate(),
        )
    }

    /** The ids in the vectors are indices into the logits. */
    private fun measure(logits: FloatArray, outputSize: Int) {
        if (logits.size != outputSize) {
            throw ModelException("the model gave ${logits.size} logits, the manifest says $outputSize", EXPORT_AGAIN)
        }
    }

    private fun judge(results: List<SequenceResult>): List<Check> {
        val limits = golden.limits(target, family)
        val mean = GoldenResult.mean(results.map { it.parityKl })
        val worst = results.map { it.parityKl.average() }.maxWith { a, b -> a.compareTo(b) } // NaN is the largest
        val matching = results.count { it.tokensMatch }
        val sha256 = bundle.artifactSha256(target)
        val recorded = golden.artifactSha256(target)
        return listOf(
            Check("artifact", sha256 == recorded, sha256.take(12), recorded.take(12)),
            Check("tokenizer", matching == results.size, matching, results.size),
            Check("parity_kl", mean <= limits.parityKlMean, mean, limits.parityKlMean),
            Check("parity_kl_sequence", worst <= limits.parityKlSequence, worst, limits.parityKlSequence),
        )
    }

    /** The sequence's tokens as this device makes them. */
    private fun tokens(sequence: GoldenSequence, tokenizer: Tokenizer): IntArray {
        val format = bundle.chatFormat
        val text = if (sequence.messages != null && format != null) {
            format.render(sequence.messages, addGenerationPrompt = true)
        } else {
            sequence.text
        }
        return tokenizer.encode(text, sequence.addSpecialTokens)
    }
}

/** Tokens and time of calls of one kind. */
internal class Timed(private val clock: Clock) {
    private var tokens = 0L
    private var nanos = 0L

    fun time(count: Int, forward: () -> FloatArray): FloatArray {
        val start = clock.nanos()
        val logits = forward()
        nanos += clock.nanos() - start
        tokens += count
        return logits
    }

    fun rate(): Double? = rate(tokens, nanos)
}
