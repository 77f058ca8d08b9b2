package edgellama.core

/** A conversation with a model of [contextLength] tokens. The KV cache goes on from turn to turn. */
class Chat(
    format: ChatFormat,
    tokenizer: Tokenizer,
    private val contextLength: Int,
    val system: String? = null,
) {
    private val conversation = Conversation(format, tokenizer)
    private val turns = ArrayList<Message>()

    /** Whether turns were left out, because the context is full. */
    var forgets = false
        private set

    /** The messages that the model still knows, the system message first. */
    val messages: List<Message>
        get() = listOfNotNull(system?.takeIf { it.isNotBlank() }?.let { Message(Role.SYSTEM, it) }) + turns

    /**
     * Takes the user's message, and gives the tokens of the conversation with the assistant's turn opened. The oldest
     * turns go when the context is full. Throws [ContextException] when this message alone does not fit.
     */
    fun ask(text: String, answerTokens: Int): IntArray {
        val asked = messages + Message(Role.USER, text)
        val prompt = conversation.prompt(asked, contextLength, answerTokens)
        if (prompt == null) {
            val length = conversation.encode(asked.take(asked.size - turns.size - 1) + asked.last()).size
            throw ContextException("this turn has $length tokens, and the context holds $contextLength")
        }
        if (prompt.dropped > 0) forgets = true
        turns.add(Message(Role.USER, text))
        turns.subList(0, prompt.dropped).clear()
        return prompt.ids
    }

    fun answered(text: String) {
        turns.add(Message(Role.ASSISTANT, text))
    }

    /** Takes back the last question, which got no answer. */
    fun withdraw() {
        if (turns.lastOrNull()?.role == Role.USER) turns.removeAt(turns.size - 1)
    }
}
