package edgellama.core

/** Token ids of a conversation. [dropped]: number of messages at its beginning that found no room. */
class Prompt(val ids: IntArray, val dropped: Int)

/** Encoder of conversations that fit the context, by the rule of edgellama/text/conversation.py. */
class Conversation(private val format: ChatFormat, private val tokenizer: Tokenizer) {
    /** Token ids with the assistant's turn opened. A control token in a message is text. */
    fun encode(messages: List<Message>): IntArray = tokenizer.encode(format.parts(messages, addGenerationPrompt = true))

    /**
     * The conversation without its oldest turns, if it is longer than the context. A system message stays.
     *
     * A quarter of the context, or [answerTokens] if they are fewer, stays free for the answer while there are turns
     * to leave out. Null if the last message alone does not fit.
     */
    fun prompt(messages: List<Message>, contextLength: Int, answerTokens: Int): Prompt? {
        val system = messages.take(1).filter { it.role == Role.SYSTEM }
        val turns = messages.drop(system.size)
        val room = contextLength - minOf(answerTokens, contextLength / 4)
        for (dropped in turns.indices step 2) { // a user's message and its answer
            val ids = encode(system + turns.drop(dropped))
            if (ids.size <= (if (dropped + 1 == turns.size) contextLength else room)) return Prompt(ids, dropped)
        }
        return null
    }
}
