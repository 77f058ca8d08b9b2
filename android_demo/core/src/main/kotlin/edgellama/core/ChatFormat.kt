package edgellama.core

/** Who speaks, under the names that chat templates use. */
enum class Role(val label: String) { SYSTEM("system"), USER("user"), ASSISTANT("assistant") }

data class Message(val role: Role, val content: String)

/** `chat.format` of a manifest: what surrounds each message, proven equal to the model's chat template. */
data class ChatFormat(
    val noSystem: String,
    val systemPrefix: String,
    val systemSuffix: String,
    val userPrefix: String,
    val userSuffix: String,
    val assistantPrefix: String,
    val assistantSuffix: String,
    val generationPrompt: String,
    val trim: Boolean,
) {
    /**
     * The text of a conversation: an optional system message, then user and assistant in turn. With
     * [addGenerationPrompt] the assistant's turn is opened. It holds special tokens: encode it without adding any.
     */
    fun render(messages: List<Message>, addGenerationPrompt: Boolean = false): String =
        parts(messages, addGenerationPrompt).joinToString("") { it.text }

    /** The text of [render] in parts, of which those with the contents of messages are typed. */
    internal fun parts(messages: List<Message>, addGenerationPrompt: Boolean = false): List<TextPart> {
        val turns = if (messages.firstOrNull()?.role == Role.SYSTEM) messages.drop(1) else messages
        val inTurn = turns.withIndex().all { (i, m) -> m.role == if (i % 2 == 0) Role.USER else Role.ASSISTANT }
        if (turns.isEmpty() || !inTurn || addGenerationPrompt && turns.last().role != Role.USER) {
            throw TokenizerException(
                "the conversation has the roles ${messages.map { it.role.label }}",
                "Give an optional system message, then user and assistant in turn.",
            )
        }
        val parts = arrayListOf(TextPart(if (turns.size == messages.size) noSystem else "", false))
        for (message in messages) {
            parts.add(TextPart(prefix(message.role), false))
            parts.add(TextPart(if (trim) strip(message.content) else message.content, true))
            parts.add(TextPart(suffix(message.role), false))
        }
        return parts + TextPart(if (addGenerationPrompt) generationPrompt else "", false)
    }

    private fun prefix(role: Role) = when (role) {
        Role.SYSTEM -> systemPrefix
        Role.USER -> userPrefix
        Role.ASSISTANT -> assistantPrefix
    }

    private fun suffix(role: Role) = when (role) {
        Role.SYSTEM -> systemSuffix
        Role.USER -> userSuffix
        Role.ASSISTANT -> assistantSuffix
    }

    companion object {
        fun of(json: JsonObject) = ChatFormat(
            noSystem = json.string("no_system"),
            systemPrefix = json.string("system_prefix"),
            systemSuffix = json.string("system_suffix"),
            userPrefix = json.string("user_prefix"),
            userSuffix = json.string("user_suffix"),
            assistantPrefix = json.string("assistant_prefix"),
            assistantSuffix = json.string("assistant_suffix"),
            generationPrompt = json.string("generation_prompt"),
            trim = json.boolean("trim"),
        )

        /** Without leading and trailing white space, which is Unicode's and U+001C to U+001F, as in Python. */
        internal fun strip(text: String) = text.trim { it.code in 0x1c..0x1f || it.code in CodePoints.spaces }
    }
}
