package edgellama.core

/** An artifact that runs: ExecuTorch on a phone, anything else in tests. Not for use by several threads at once. */
interface LogitsModel : AutoCloseable {
    val vocabSize: Int

    /** Number of logits of a position, fewer than the vocabulary in a classifier. */
    val outputSize: Int get() = vocabSize
    val contextLength: Int

    /** What computes, with its version, as device logs name it. */
    val runtime: String

    /**
     * Logits after the last of [tokens], which join the KV cache from [position] on; what the cache held from there
     * on is overwritten. Throws [ModelException].
     */
    fun forward(tokens: IntArray, position: Int): FloatArray
}

/** A model with the tokens in its KV cache. */
class Session(val model: LogitsModel) {
    private var cached = IntArray(0)

    /** Number of tokens in the cache. */
    var position = 0
        private set

    /** Number of tokens that the last [feed] found in the cache. */
    var reused = 0
        private set

    /**
     * Makes the cache hold [tokens] and returns the logits after the last. If it holds their beginning, only the rest
     * is fed; in pieces, between which [stopped] is asked. Null when that said so.
     */
    fun feed(tokens: IntArray, stopped: () -> Boolean = { false }): FloatArray? {
        require(tokens.isNotEmpty()) { "no tokens to feed" }
        if (tokens.size > model.contextLength) {
            throw ContextException(
                "the text has ${tokens.size} tokens, and the context of this model holds ${model.contextLength}",
            )
        }
        val continues = position < tokens.size && (0 until position).all { cached[it] == tokens[it] }
        if (!continues) reset()
        reused = position
        var logits: FloatArray? = null
        while (position < tokens.size) {
            if (stopped()) return null
            logits = push(tokens.copyOfRange(position, minOf(position + PIECE, tokens.size)))
        }
        return logits
    }

    /** Feeds [tokens] after those in the cache: the logits after the last. */
    fun push(tokens: IntArray): FloatArray {
        val logits = model.forward(tokens, position)
        cached = cached.copyOf(position) + tokens
        position += tokens.size
        return logits
    }

    /** Forgets all tokens. */
    fun reset() {
        position = 0
        cached = IntArray(0)
    }

    internal companion object {
        const val PIECE = 512 // tokens
    }
}
