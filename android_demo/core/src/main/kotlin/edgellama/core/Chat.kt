package edgellama.core

/** A conversation with a model. The KV cache goes on from turn to turn. */
class Chat(private val format: ChatFormat, private val tokenizer: Tokenizer, val system: String? = null) {
    private val turns = ArrayList<Message>()

    /** The messages so far, the system message first. */
    val messages: List<Message>
        get() = listOfNotNull(system?.takeIf { it.isNotBlank() }?.let { Message(Role.SYSTEM, it) }) + turns

    /** Takes the user's message, and gives the tokens of the conversation with the assistant's turn opened. */
    fun ask(text: String): IntArray {
        val asked = messages + Message(Role.USER, text)
        val tokens = tokenizer.encode(format.render(asked, addGenerationPrompt = true), addSpecialTokens = false)
        turns.add(Message(Role.USER, text))
        return tokens
    }

    fun answered(text: String) {
        turns.add(Message(Role.ASSISTANT, text))
    }

    /** Takes back the last question, which got no answer. */
    fun withdraw() {
        if (turns.lastOrNull()?.role == Role.USER) turns.removeAt(turns.size - 1)
    }
}
