package edgellama.core

/** Nanoseconds that only go forward; the system's clock, or a test's. */
fun interface Clock {
    fun nanos(): Long

    companion object {
        val SYSTEM = Clock(System::nanoTime)
    }
}

/** Why a text ended. */
enum class Finish(val label: String) {
    STOP("stop token"), LENGTH("length"), CONTEXT("the context is full"), STOPPED("stopped")
}

/** Tokens and times of one answer. */
data class Stats(
    val promptTokens: Int,
    val cachedTokens: Int,
    val generatedTokens: Int,
    val prefillNanos: Long,
    val firstTokenNanos: Long,
    val decodeNanos: Long,
) {
    /** Tokens per second of the prompt's tokens that were not in the cache; null for none. */
    val prefillRate: Double? get() = rate((promptTokens - cachedTokens).toLong(), prefillNanos)

    /** Tokens per second; the first token comes from prefill and is not counted. */
    val decodeRate: Double? get() = rate(generatedTokens - 1L, decodeNanos)

    /** Milliseconds from the request to the first token. */
    val firstTokenMillis: Double get() = firstTokenNanos / 1e6
}

internal fun rate(tokens: Long, nanos: Long): Double? = if (tokens > 0 && nanos > 0) tokens * 1e9 / nanos else null

class Generated(val ids: IntArray, val finish: Finish, val stats: Stats)

/** The generation loop: tokens one by one, until a stop token, a limit, the end of the context, or a person's wish. */
class Generator(
    private val session: Session,
    private val tokenizer: Tokenizer,
    private val stopIds: Set<Int>,
    private val clock: Clock = Clock.SYSTEM,
) {
    /**
     * Continues [prompt]. [onText] gets pieces of text as they become certain, and how many tokens there are so far.
     * [stopped] is asked after each token, and between the pieces of a long prompt. The cache then holds the prompt
     * and all but the last token. Throws an [EdgeLlamaException].
     */
    fun generate(
        prompt: IntArray,
        sampler: Sampler,
        maxTokens: Int,
        stopped: () -> Boolean = { false },
        onText: (String, Int) -> Unit,
    ): Generated {
        val start = clock.nanos()
        var logits = session.feed(prompt, stopped)
        val prefill = clock.nanos() - start
        val ids = ArrayList<Int>()
        val stream = tokenizer.stream()
        var first = prefill
        var finish: Finish? = if (logits == null) Finish.STOPPED else null
        while (finish == null) {
            val id = sampler.sample(logits!!)
            ids.add(id)
            if (ids.size == 1) first = clock.nanos() - start
            finish = when {
                id in stopIds -> Finish.STOP
                ids.size >= maxTokens -> Finish.LENGTH
                session.position == session.model.contextLength -> Finish.CONTEXT
                stopped() -> Finish.STOPPED
                else -> null
            }
            if (finish != Finish.STOP) onText(stream.push(id), ids.size)
            if (finish == null) logits = session.push(intArrayOf(id))
        }
        val rest = stream.flush()
        if (rest.isNotEmpty()) onText(rest, ids.size)
        val decode = clock.nanos() - start - first
        val stats = Stats(prompt.size, session.reused, ids.size, prefill, first, decode)
        return Generated(ids.toIntArray(), finish, stats)
    }
}
